"""Runs the `decodax` command for `python -m decodax`."""

from decodax.cli import main

if __name__ == "__main__":
    main()
