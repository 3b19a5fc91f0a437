"""Caches of past tokens: read by layers, written by `commit`."""

from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.latent import LatentCache
from decodax.layers.kv_cache.recurrent import RecurrentCache
from decodax.layers.kv_cache.tailed import TailedCache

METHODS = {"full": KVCache, "latent": LatentCache, "tailed": TailedCache, "recurrent": RecurrentCache}

__all__ = ["METHODS"]
