"""`python -m decodax` is the `decodax` command."""

from decodax.cli import main

main()
