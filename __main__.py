"""`python -m decodax` is the `decodax` command."""

from decodax.cli import main

if __name__ == "__main__":
    main()
