"""Holds the version of decodax."""

__version__ = "0.1.0"
