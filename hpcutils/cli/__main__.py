"""`python -m hpcutils.cli`: the command line without its script."""

from hpcutils.cli import main

main()
