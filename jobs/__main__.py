"""`python -m jobs` runs `alfa` from a checkout that is not installed."""

from jobs.cli import main

main()
