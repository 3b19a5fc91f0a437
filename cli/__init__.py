"""The `decodax` command: generate, bench, methods, plan, train."""

from decodax.cli.app import app, main

__all__ = ["app", "main"]
