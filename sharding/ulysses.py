"""Attention of a prompt whose tokens are split over devices: all-to-alls make it one whose heads are split, and back.

DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models, arXiv
2309.14509. Each of n devices gets all tokens of N / n heads, attends as if it were alone, and the results go back. What
a device sends does not grow with n, at the same number of tokens on each.

With grouped heads (GQA), key-value heads that n does not divide are first copied until it does: as few times as that
takes, so that the query heads of a device find theirs there. Queries, keys and values of one size travel together, in
one exchange; so a layer has two (DeepSpeed Ulysses has four), and a third for the log-sum-exps where they are used.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.sharding.merging import MeshAxes, Part

# Of queries [B, T, N, H], keys [B, K, T, H] and values [B, K, T, I] of all tokens: what the mask lets them read.
WholeAttention = Callable[[Array, Array, Array], Part]


def num_copies(num_heads: int, num_kv_heads: int, num_devices: int) -> int | None:
    """How often each key-value head has to exist for the devices to share the heads out; None if they cannot.

    >>> num_copies(32, 8, 8), num_copies(32, 8, 16), num_copies(24, 3, 8), num_copies(12, 12, 8)
    (1, 2, 8, None)
    """
    return None if num_heads % num_devices else math.lcm(num_kv_heads, num_devices) // num_kv_heads


def ulysses(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T J"],
    value: Float[Array, "B K T I"],
    attention: WholeAttention,
    *,
    axis: MeshAxes,
) -> Part:
    """What every device's queries read of all devices' keys and values; called within `shard_map`.

    The arrays are a device's own T tokens, which follow those of the device before it. `attention` gets all tokens, and
    device i the i-th part of the heads. Moves by `all-to-all` only.

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
    part = attention(*_heads_apart(query, key, value, axis))
    return Part(*(jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True) for x in part))


def _heads_apart(query: Array, key: Array, value: Array, axis: MeshAxes) -> tuple[Array, Array, Array]:
    """All tokens of a part of the heads."""
    batch, num_tokens, _, size = query.shape
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        query = jax.lax.all_to_all(query, axis, split_axis=2, concat_axis=1, tiled=True)
        return query, *(jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True) for x in (key, value))
    grouped = jnp.moveaxis(query.reshape(batch, num_tokens, key.shape[1], -1, size), 1, 3)
    together = jnp.concatenate([grouped, key[:, :, None], value[:, :, None]], axis=2)
    together = jax.lax.all_to_all(together, axis, split_axis=1, concat_axis=3, tiled=True)
    query = jnp.moveaxis(together[:, :, :-2], 3, 1)
    return query.reshape(*query.shape[:2], -1, size), together[:, :, -2], together[:, :, -1]
