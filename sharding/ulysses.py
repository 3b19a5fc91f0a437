"""Computes attention of a prompt whose tokens are split over devices, with all-to-alls that split heads instead.

DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models, arXiv
2309.14509. Each of n devices gets all tokens of N / n heads, computes their attention alone, and sends the results
back. With the same number of tokens on each device, what a device sends does not grow with n.

With grouped heads (GQA), key-value heads that n does not divide are first copied as few times as needed until it does,
so that a device has the key-value heads of its query heads. Queries, keys and values of one size go in one all-to-all;
so a layer has two (DeepSpeed Ulysses has four), and a third for the log-sum-exps where they are used.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.core.partial_softmax import MeshAxes, PartialSoftmax

# Masked attention of queries [B, T, N, H] to keys [B, K, T, H] and values [B, K, T, I], of all tokens.
GatheredAttention = Callable[[Array, Array, Array], PartialSoftmax]


def num_copies(num_heads: int, num_kv_heads: int, num_devices: int) -> int | None:
    """How many copies of each key-value head make the heads divide over the devices; None if none do.

    >>> num_copies(32, 8, 8), num_copies(32, 8, 16), num_copies(24, 3, 8), num_copies(12, 12, 8)
    (1, 2, 8, None)
    """
    return None if num_heads % num_devices else math.lcm(num_kv_heads, num_devices) // num_kv_heads


def ulysses(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T J"],
    value: Float[Array, "B K T I"],
    attention: GatheredAttention,
    *,
    axis: MeshAxes,
) -> PartialSoftmax:
    """Attention of every device's queries to all devices' keys and values; called within `shard_map`.

    Communicates by `all-to-all` only.

    query, key, value: of a device's own T tokens, which follow those of the device before it.
    attention: gets all tokens, and on device i the i-th group of heads.
    axis: the mesh axes of the devices.
    Raises ValueError if the heads do not divide over the devices.
    """
    num_devices, num_heads = jax.lax.axis_size(axis), query.shape[2]
    copies = num_copies(num_heads, key.shape[1], num_devices)
    if copies is None:
        raise ValueError(
            f"Ulysses splits heads over devices, and {num_heads} heads do not divide over {num_devices} of them: "
            "use context='ring', or a mesh with another size of 'context'"
        )
    key, value = (jnp.repeat(tokens, copies, axis=1) for tokens in (key, value))
    partial = attention(*_split_heads(query, key, value, axis))
    return PartialSoftmax(*(jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True) for x in partial))


def _split_heads(query: Array, key: Array, value: Array, axis: MeshAxes) -> tuple[Array, Array, Array]:
    """All tokens of this device's group of heads.

    query, key, value: all heads of this device's tokens.
    axis: the mesh axes of the devices.
    """
    batch, num_tokens, _, size = query.shape
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        query = jax.lax.all_to_all(query, axis, split_axis=2, concat_axis=1, tiled=True)
        return query, *(jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True) for x in (key, value))
    grouped = jnp.moveaxis(query.reshape(batch, num_tokens, key.shape[1], -1, size), 1, 3)
    together = jnp.concatenate([grouped, key[:, :, None], value[:, :, None]], axis=2)
    together = jax.lax.all_to_all(together, axis, split_axis=1, concat_axis=3, tiled=True)
    query = jnp.moveaxis(together[:, :, :-2], 3, 1)
    return query.reshape(*query.shape[:2], -1, size), together[:, :, -2], together[:, :, -1]
