"""Lists the caches of past tokens, one per file: layers read them, `commit` writes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods

if TYPE_CHECKING:
    from decodax.layers.kv_cache.contract import Cache

_METHODS = Methods(
    __name__,
    {
        "full": "KVCache",
        "latent": "LatentCache",
        "tailed": "TailedCache",
        "recurrent": "RecurrentCache",
    },
)
METHODS: "Mapping[str, type[Cache]]" = _METHODS
