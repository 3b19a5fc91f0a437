"""Holds the layers of a block: shared primitives, and one folder per contract (attention, mixers, caches)."""

if __name__ != "decodax.layers":
    raise ImportError("layers is a part of decodax: import decodax.layers")
