"""Holds what every other folder uses: logical axes, weight descriptions, pytrees, argument checks, a few operations."""

if __name__ != "decodax.core":
    raise ImportError("core is a part of decodax: import decodax.core")
