"""`python -m jobs.cli`: what the console script `otpo` runs."""

from jobs.cli import main

main()
