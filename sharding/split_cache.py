"""Attention over a cache whose slots are split over devices: the cache stays, queries and what they have read move.

A device reads its own slots and has a part of every query's softmax; parts are merged by their log-sum-exps, as other
programs split a cache over the cores of one device. Lean Attention: Hardware-Aware Scalable Attention Mechanism for the
Decode-Phase of Transformers, arXiv 2405.10480.

With few queries, as when decoding, all devices have all of them, and all need the result (`merge_over_devices`). With
many, as in a chunk of a prompt, each device has its own (`read_by_all`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.sharding.merging import MeshAxes, Part, divided, merge_stack, or_zero


def merge_over_devices(part: Part, axis: MeshAxes) -> Part:
    """Every device's part as one, on all of them; called within `shard_map`.

    Two sums over devices, of one number and of I + 1 numbers for each query and head, whatever the number of keys.
    """
    maximum = or_zero(jax.lax.pmax(part.lse, axis))
    weight = jnp.exp(part.lse - maximum)[..., None]
    weighted = jnp.concatenate([part.output.astype(jnp.float32) * weight, weight], axis=-1)
    summed = jax.lax.psum(weighted, axis)
    return divided(summed[..., :-1], summed[..., -1], maximum)


def read_by_all(query: Float[Array, "B T N H"], attention: Callable[[Array], Part], *, axis: MeshAxes) -> Part:
    """What this device's T queries read of the slots of all devices; called within `shard_map`.

    `attention` gives what all devices' queries [B, n T, N, H], in the devices' order, read of this device's slots.

    An all-gather of the queries, and an all-to-all of what they have read and of its log-sum-exps: for every query and
    head H + I + 1 numbers, n - 1 times over all devices. Queries that go round with their results would be as many
    numbers, of which the results would have to be float32, in n steps that wait for each other.
    """
    num_devices, num_tokens = jax.lax.axis_size(axis), query.shape[1]
    part = attention(jax.lax.all_gather(query, axis, axis=1, tiled=True))

    def by_owner(tokens: Array) -> Array:
        """[B, n T, ...], queries of all, to [B, n, T, ...]: parts of this device's."""
        apart = tokens.reshape(tokens.shape[0], num_devices, num_tokens, *tokens.shape[2:])
        return jax.lax.all_to_all(apart, axis, split_axis=1, concat_axis=1, tiled=True)

    return merge_stack(by_owner(part.output), by_owner(part.lse))
