"""`python -m markovia`."""

from markovia.cli import main

main()
