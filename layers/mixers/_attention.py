"""Shares code between configs of layers that attend with heads: their cost, and the kernel that runs."""

from typing import Any

import jax
from jax.typing import DTypeLike

from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.mixers.contract import MixingCost


class CachesKeysAndValues:
    """The base of configs whose keys and values any cache policy may keep."""

    def unsupported_policy_reason(self, policy: CachePolicy) -> str | None:
        return None


def attention_cost(num_heads: int, head_size: int, window: int | None, num_new: int, num_cached: int) -> MixingCost:
    """Scores and weighted values: 4 H FLOPs per head and token attended to.

    num_heads, head_size, window: of the layer.
    num_new, num_cached: as in `Mixer.mixing_cost`.
    """
    num_keys, num_read = num_cached + (num_new + 1) / 2, float(num_cached)
    if window is not None:
        num_keys, num_read = min(num_keys, window), min(num_read, window)
    return MixingCost(4 * num_heads * head_size * num_keys, num_read, num_heads, head_size)


def attention_kernel(
    heads: tuple[int, int, int], window: int | None, cache: Any, num_new: int, dtype: DTypeLike
) -> KernelSelection:
    """The kernel of attention on this machine.

    heads: query heads, key-value heads, head size.
    window: of the layer.
    cache: of keys and values, as shapes.
    num_new: new tokens per row.
    dtype: of queries, keys and values.
    """
    from decodax.layers.attention.attend_kernels import select_attention  # late: not before a kernel is asked for

    num_heads, num_kv_heads, head_size = heads
    batch_size = cache.length.shape[0]
    query = jax.ShapeDtypeStruct((batch_size, num_new, num_heads, head_size), dtype)
    own = jax.ShapeDtypeStruct((batch_size, num_kv_heads, num_new, head_size), dtype)
    mask = Causal() if window is None else Causal() & Window(window)
    return select_attention(query, own, own, mask, cache, ON_THIS_DEVICE)
