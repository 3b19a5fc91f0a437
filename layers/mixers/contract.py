"""Defines the contract between a block and a mixer: an attention or recurrent layer with its own weights and cache.

A mixer is a frozen config; `module` makes the linen module that runs it. The module maps (hidden, position, row_length,
cache, mask) to (hidden, cache update) and never writes the cache; the cache's `commit` does, for accepted tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jax.typing import DTypeLike

from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache


@dataclass(frozen=True)
class MixingCost:
    """What a layer does for one new token beside the products with its weights, with all heads on one device.

    flops: of the token.
    num_read: cached tokens that it reads; 0 where a state stands for them.
    num_heads, value_size: of the partial softmaxes that devices merge which have some of the cached tokens each; no
        heads where there are none.
    """

    flops: float
    num_read: float
    num_heads: int = 0
    value_size: int = 0


@runtime_checkable
class Mixer(Protocol):
    """Grouped-query attention is one; latent attention and recurrent layers are others."""

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """`Weight` descriptions of the weights, as a (nested) dictionary of the parameters' shape."""
        ...

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module: ...

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache) -> Any:
        """This layer's cache (`KeptCache`).

        batch_size: rows.
        capacity: tokens of each row.
        dtype: of the cached numbers.
        policy: how keys and values are cached. A layer that cannot honour it makes its own cache, as in a model where
            only some layers have keys and values; `Model.empty_cache` raises where none of the layers can.
        """
        ...

    def unsupported_policy_reason(self, policy: CachePolicy) -> str | None:
        """Why this layer's cache is not made by the policy; None where it is, or keeps the marks that it is for."""
        ...

    def invariant_unsupported_reason(self) -> str | None:
        """Why this layer has no invariant mode (`Model.invariant`).

        None where it passes its view of a `KVCache` to `attend` as it is, and asks for no part of it.
        """
        ...

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        """An empty cache update of `num_tokens` tokens, to stage them; has `place(new, slot)`."""
        ...

    def mixing_cost(self, num_new: int, num_cached: int) -> MixingCost:
        """The cost of each of `num_new` new tokens after `num_cached` cached ones, on average."""
        ...

    def kernel(
        self, batch_size: int, num_new: int, capacity: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        """What runs for `num_new` new tokens per row, with a cache of that capacity, and why.

        Raises NotImplementedError where `execution` asks for a kernel that does not fit.
        """
        ...
