"""Caches of past tokens: read by layers, written by `commit`."""

from decodax.layers.kv_cache.full import KVCache

METHODS = {"full": KVCache}

__all__ = ["METHODS"]
