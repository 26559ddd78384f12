"""`python -m sqft` is the command line."""

from sqft.cli import main

main()
