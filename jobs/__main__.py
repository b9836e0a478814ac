"""`python -m jobs`: the same as `alfa`, from a checkout that is not installed."""

from jobs.cli import main

main()
