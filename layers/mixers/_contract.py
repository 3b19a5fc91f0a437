"""What a block asks of a mixer: the layer that lets tokens exchange information, with its own weights and cache.

A mixer is a frozen config; `module` gives the linen module that runs it. The module maps (hidden, position, row_length,
cache, mask) to (hidden, new rows) and never writes the cache; the cache's `commit` does, once the tokens are accepted.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jax.typing import DTypeLike

from decodax.layers.execution import Execution
from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache


@runtime_checkable
class Mixer(Protocol):
    """Grouped-query attention is one; latent attention and recurrent layers are others."""

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """`Weight` descriptions of the weights, as a (nested) dictionary of the parameters' shape."""
        ...

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module: ...

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache) -> Any:
        """What this layer keeps of past tokens; has `length` Int[B], `capacity` and `commit(rows, count, path)`.

        `policy` says how keys and values are kept; layers that keep something else have no use for it.
        """
        ...

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        """Room for what this layer gives for `num_tokens` tokens, to stage them; has `place(new, slot)`."""
        ...
