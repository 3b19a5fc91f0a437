"""Defines the contract between a block and a mixer: an attention or recurrent layer with its own weights and cache.

A mixer is a frozen config; `module` makes the linen module that runs it. The module maps (hidden, position, row_length,
cache, mask) to (hidden, cache update) and never writes the cache; the cache's `commit` does, for accepted tokens.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jax.typing import DTypeLike

from decodax.layers.execution import Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache


@runtime_checkable
class Mixer(Protocol):
    """Grouped-query attention is one; latent attention and recurrent layers are others."""

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """`Weight` descriptions of the weights, as a (nested) dictionary of the parameters' shape."""
        ...

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module: ...

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache) -> Any:
        """This layer's cache; has `length` Int[B], `capacity` and `commit(update, count, path)`.

        batch_size: rows.
        capacity: tokens of each row.
        dtype: of the cached numbers.
        policy: how keys and values are cached; layers without them ignore it.
        """
        ...

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        """An empty cache update of `num_tokens` tokens, to stage them; has `place(new, slot)`."""
        ...
