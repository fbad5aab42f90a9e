"""`python -m hpcutils`: the command line without its script."""

from hpcutils.cli import main

main()
