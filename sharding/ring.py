"""Computes attention of a prompt whose tokens are split over devices by permuting keys and values around a ring.

Ring Attention with Blockwise Transformers for Near-Infinite Context, arXiv 2310.01889. With the online softmax, in one
pass: a device keeps its queries, gets the keys and values of one other device at a time and merges partial softmaxes.
The first ring took two passes, and held the scores of a device's queries with all keys. Sequence Parallelism: Long
Sequence Training from System Perspective, arXiv 2105.13120. Only key-value heads are permuted, not the query heads that
share them.

A causal mask makes half of all work empty. With tokens in natural order the last device would do most of the other
half, so the 2 n blocks on n devices are in zigzag order: device i gets blocks i and 2 n - 1 - i. Of any two devices'
blocks, two of the four products are then not empty, and one of those is full, whichever device is first, so all
devices do the same work at the same time. Only this file uses that order: two permutes bring tokens into it, and two
bring the results back.

Where a window is so narrow that queries attend to few devices' keys, natural order is balanced already, and the ring
ends with the last device that a query attends to.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.partial_softmax import MeshAxes, PartialSoftmax, in_float32, merge

# Attention of queries [B, T, N, H] to keys [B, K, S, H] and values [B, K, S, I] under the causal mask (and a window);
# the last argument is how many tokens the first query is after the first key.
BlockAttention = Callable[[Array, Array, Array, Int[Array, ""]], PartialSoftmax]


def ring(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T J"],
    value: Float[Array, "B K T I"],
    attention: BlockAttention,
    *,
    axis: MeshAxes,
    window: int | None = None,
) -> PartialSoftmax:
    """Attention of every device's queries to all devices' keys and values; called within `shard_map`.

    query, key, value: of a device's own T tokens, which follow those of the device before it.
    attention: a partial softmax; also applies the window.
    axis: the mesh axes of the devices.
    window: here it only says which devices' keys are not needed.

    Communicates by `collective-permute` only: n - 1 steps (fewer with a window) of a device's keys and values, and in
    zigzag order two more of queries, keys, values and results.
    """
    num_devices = jax.lax.axis_size(axis)
    if is_zigzag(query.shape[1], num_devices, window):
        return _in_zigzag(query, key, value, attention, axis)
    device, num_tokens = jax.lax.axis_index(axis), query.shape[1]
    own = attention(query, key, value, jnp.int32(0))

    def absorb(merged: PartialSoftmax, step: Int[Array, ""], key: Array, value: Array) -> PartialSoftmax:
        def attend() -> PartialSoftmax:
            return merge(merged, attention(query, key, value, step * num_tokens))

        return jax.lax.cond(step <= device, attend, lambda: merged)  # else the keys are after the queries

    steps = num_steps(num_tokens, num_devices, window)
    return _rotate(in_float32(own), absorb, key, value, steps, axis)


def num_steps(num_tokens: int, num_devices: int, window: int | None) -> int:
    """How many devices' keys a query may attend to, its own device's included; `num_tokens` are on each."""
    return num_devices if window is None else min(num_devices, 1 + -(-(window - 1) // num_tokens))


def is_zigzag(num_tokens: int, num_devices: int, window: int | None) -> bool:
    """Whether zigzag order gives the busiest device less work: (2 n + 1) / 4 products of all tokens of two devices.

    In natural order it computes one product per step, but half of one for its own tokens.
    """
    return num_tokens % 2 == 0 and num_steps(num_tokens, num_devices, window) - 0.5 > (2 * num_devices + 1) / 4


def _in_zigzag(query: Array, key: Array, value: Array, attention: BlockAttention, axis: MeshAxes) -> PartialSoftmax:
    num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    block, last = query.shape[1] // 2, 2 * num_devices - 1
    (low, high), (low_key, high_key), (low_value, high_value) = (
        _to_zigzag(tokens, tokens_axis, axis) for tokens, tokens_axis in ((query, 1), (key, 2), (value, 2))
    )

    own_low = attention(low, low_key, low_value, jnp.int32(0))
    own_high = attention(high, high_key, high_value, jnp.int32(0))
    across = attention(high, low_key, low_value, (last - 2 * device) * block)
    merged = in_float32(own_low), merge(own_high, across)

    def absorb(
        merged: tuple[PartialSoftmax, PartialSoftmax], step: Int[Array, ""], key: tuple, value: tuple
    ) -> tuple[PartialSoftmax, PartialSoftmax]:
        """Later queries attend to the other's earlier keys; in each half, the later device attends to the other's."""
        merged_low, merged_high = merged
        other = (device - step) % num_devices
        is_later = other < device

        def of_half(low: Array, high: Array) -> Array:
            return jnp.where(is_later, low, high)

        merged_high = merge(merged_high, attention(high, key[0], value[0], (last - device - other) * block))
        partial = attention(of_half(low, high), of_half(*key), of_half(*value), jnp.abs(device - other) * block)
        both = merge(PartialSoftmax(*map(of_half, merged_low, merged_high)), partial)
        return (
            PartialSoftmax(*(jnp.where(is_later, new, old) for new, old in zip(both, merged_low, strict=True))),
            PartialSoftmax(*(jnp.where(is_later, old, new) for new, old in zip(both, merged_high, strict=True))),
        )

    halves = _rotate(merged, absorb, (low_key, high_key), (low_value, high_value), num_devices, axis)
    (low_result, low_lse), (high_result, high_lse) = halves
    result = _from_zigzag(low_result.astype(query.dtype), high_result.astype(query.dtype), axis)
    return PartialSoftmax(result, _from_zigzag(low_lse, high_lse, axis))


def _rotate(merged, absorb, key, value, steps: int, axis: MeshAxes):
    """The merged partial softmaxes over the keys and values of `steps` devices, its own included.

    The permute of the next keys and values overlaps with the attention to the current ones.

    merged: over the device's own keys.
    absorb: merges the attention to another device's keys and values.
    key, value: of the device's own tokens.
    steps: as `num_steps` says.
    axis: the mesh axes of the devices.
    """
    num_devices = jax.lax.axis_size(axis)
    to_next = [(device, (device + 1) % num_devices) for device in range(num_devices)]
    if steps == 1:
        return merged

    def step(index: Int[Array, ""], carry):
        merged, current = carry
        following = jax.lax.ppermute(current, axis, to_next)
        return absorb(merged, index, *current), following

    first = jax.lax.ppermute((key, value), axis, to_next)
    merged, last = jax.lax.fori_loop(1, steps - 1, step, (merged, first))
    return absorb(merged, jnp.int32(steps - 1), *last)


def _destinations(num_devices: int, parity: int) -> list[tuple[int, int]]:
    """Where each device's even (or odd) block goes: block b is held by device b, or by 2 n - 1 - b if that is less."""
    blocks = [2 * device + parity for device in range(num_devices)]
    return [(device, min(block, 2 * num_devices - 1 - block)) for device, block in enumerate(blocks)]


def _to_zigzag(tokens: Array, tokens_axis: int, axis: MeshAxes) -> tuple[Array, Array]:
    """From blocks 2 i and 2 i + 1 on device i to blocks i and 2 n - 1 - i, of which one is even and one odd."""
    num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    halves = jnp.split(tokens, 2, axis=tokens_axis)
    even, odd = (jax.lax.ppermute(halves[parity], axis, _destinations(num_devices, parity)) for parity in (0, 1))
    is_even = device % 2 == 0
    return jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)


def _from_zigzag(low: Array, high: Array, axis: MeshAxes) -> Array:
    """The inverse of `_to_zigzag`; the tokens are on axis 1."""
    num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    is_even, halves = device % 2 == 0, []
    for parity, block in enumerate((jnp.where(is_even, low, high), jnp.where(is_even, high, low))):
        back = [(there, here) for here, there in _destinations(num_devices, parity)]
        halves.append(jax.lax.ppermute(block, axis, back))
    return jnp.concatenate(halves, axis=1)
