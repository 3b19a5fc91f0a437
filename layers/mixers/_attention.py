"""Shares code between configs of layers that attend with heads: their caches, their cost, the kernel that runs."""

from typing import Any

import jax
from jax.typing import DTypeLike

from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.mixers.contract import MixingCost


class AttentionConfig:
    """The base of configs that attend with heads, whose keys and values any cache policy may keep.

    num_heads, num_kv_heads, head_size: of the layer.
    window: tokens a query attends to, itself included (None: all).
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache) -> Any:
        return policy.empty(batch_size, self.num_kv_heads, capacity, self.head_size, dtype)

    def unsupported_policy_reason(self, policy: CachePolicy) -> str | None:
        return None

    def invariant_unsupported_reason(self) -> str | None:
        return None

    def mixing_cost(self, num_new: int, num_cached: int) -> MixingCost:
        """Scores and weighted values: 4 H FLOPs per head and token attended to."""
        num_keys, num_read = num_cached + (num_new + 1) / 2, float(num_cached)
        if self.window is not None:
            num_keys, num_read = min(num_keys, self.window), min(num_read, self.window)
        return MixingCost(4 * self.num_heads * self.head_size * num_keys, num_read, self.num_heads, self.head_size)

    def kernel(
        self, batch_size: int, num_new: int, capacity: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        from decodax.layers.attention.attend_kernels import select_attention  # late: not before a kernel is asked for

        cache = jax.eval_shape(lambda: AttentionConfig.empty_cache(self, batch_size, capacity, dtype))
        query = jax.ShapeDtypeStruct((batch_size, num_new, self.num_heads, self.head_size), dtype)
        own = jax.ShapeDtypeStruct((batch_size, self.num_kv_heads, num_new, self.head_size), dtype)
        mask = Causal() if self.window is None else Causal() & Window(self.window)
        return select_attention(query, own, own, mask, cache, execution)
