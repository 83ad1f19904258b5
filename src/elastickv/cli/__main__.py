"""`python -m elastickv.cli`, for where the console script is not on the PATH."""

from elastickv.cli import main

main()
