"""Computes attention over a cache whose slots are split over devices, by sending queries and partial softmaxes.

The cache does not move. A device attends to its own slots and has a partial softmax of every query; these are merged by
their log-sum-exps, as other programs split a cache over the cores of one device. Lean Attention: Hardware-Aware
Scalable Attention Mechanism for the Decode-Phase of Transformers, arXiv 2405.10480.

With few queries, as in decoding, all devices have all queries, and all need the result (`merge_over_devices`). With
many, as in a chunk of a prompt, each device has its own queries (`read_by_all`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.core.partial_softmax import MeshAxes, PartialSoftmax, divided, merge_stack, or_zero


def merge_over_devices(partial: PartialSoftmax, axis: MeshAxes) -> PartialSoftmax:
    """The partial softmaxes of all devices merged, replicated; called within `shard_map`.

    Two all-reduces, of one number and of I + 1 numbers for each query and head, whatever the number of keys.
    """
    maximum = or_zero(jax.lax.pmax(partial.lse, axis))
    weight = jnp.exp(partial.lse - maximum)[..., None]
    weighted = jnp.concatenate([partial.output.astype(jnp.float32) * weight, weight], axis=-1)
    summed = jax.lax.psum(weighted, axis)
    return divided(summed[..., :-1], summed[..., -1], maximum)


def read_by_all(
    query: Float[Array, "B T N H"], attention: Callable[[Array], PartialSoftmax], *, axis: MeshAxes
) -> PartialSoftmax:
    """Attention of this device's T queries to the slots of all devices; called within `shard_map`.

    An all-gather of the queries, and an all-to-all of the partial outputs and log-sum-exps: for every query and head
    H + I + 1 numbers, n - 1 times over all devices. Permuting queries and results around a ring would send as many
    numbers, with the results in float32, in n steps that wait for each other.

    query: this device's.
    attention: of all devices' queries [B, n T, N, H], in the devices' order, to this device's slots.
    axis: the mesh axes of the devices.
    """
    num_devices, num_tokens = jax.lax.axis_size(axis), query.shape[1]
    partial = attention(jax.lax.all_gather(query, axis, axis=1, tiled=True))

    def by_owner(tokens: Array) -> Array:
        """[B, n T, ...] of all queries to [B, n, T, ...]: the partial results of this device's queries."""
        apart = tokens.reshape(tokens.shape[0], num_devices, num_tokens, *tokens.shape[2:])
        return jax.lax.all_to_all(apart, axis, split_axis=1, concat_axis=1, tiled=True)

    return merge_stack(by_owner(partial.output), by_owner(partial.lse))
