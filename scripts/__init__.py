"""Holds the scripts that people run: training of the embedded model, golden files, generation on several hosts."""

if __name__ != "decodax.scripts":
    raise ImportError("scripts is a part of decodax: import decodax.scripts")
