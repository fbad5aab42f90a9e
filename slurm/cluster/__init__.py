"""The sandbox cluster: real Slurm daemons, each in a host of its own made of Linux namespaces.

Standard library only: this runs on a bare machine, before any virtual environment exists.

    cli ─► lifecycle ─► hosts, network, daemons ─► process, view, users ─► kernel, config, errors
        └► commands (run something as the ordinary user)
"""
