"""Attention of a prompt whose tokens are split over devices: keys and values go round a ring of them.

Ring Attention with Blockwise Transformers for Near-Infinite Context, arXiv 2310.01889. With the online softmax, in one
pass: a device keeps its queries, sees the keys and values of one other device at a time and merges what it has read.
The first ring took two passes, and held the scores of a device's queries with all keys. Sequence Parallelism: Long
Sequence Training from System Perspective, arXiv 2105.13120. Only key-value heads travel, not the query heads that share
them.

A causal mask makes half of all work empty. With tokens in natural order the last device would do most of the other
half, so the blocks of 2 n on n devices are dealt out in zigzag: device i gets blocks i and 2 n - 1 - i. Of any two
devices' blocks, two of the four products are then not empty, one of them whole whoever stands first, so all devices do
the same work at the same time. Tokens are in that order in here only: two permutations bring them into it, and two the
results back.

Where a window is so narrow that few devices' keys are read, natural order is balanced already, and the ring ends with
the last device that anybody reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.sharding.merging import MeshAxes, Part, in_float32, merge

# Of queries [B, T, N, H], keys [B, K, S, H], values [B, K, S, I] and how many tokens the first query stands behind the
# first key: what the causal mask (and a window) let the queries read.
BlockAttention = Callable[[Array, Array, Array, Int[Array, ""]], Part]


def ring(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T J"],
    value: Float[Array, "B K T I"],
    attention: BlockAttention,
    *,
    axis: MeshAxes,
    window: int | None = None,
) -> Part:
    """What every device's queries read of all devices' keys and values; called within `shard_map`.

    The arrays are a device's own T tokens, which follow those of the device before it. `attention` also applies the
    window; here it says which devices' keys need not come.

    Moves by `collective-permute` only: n - 1 steps (fewer with a window) of a device's keys and values, and in zigzag
    order two more of queries, keys, values and results.
    """
    num_devices = jax.lax.axis_size(axis)
    if is_zigzag(query.shape[1], num_devices, window):
        return _in_zigzag(query, key, value, attention, axis)
    device, num_tokens = jax.lax.axis_index(axis), query.shape[1]
    own = attention(query, key, value, jnp.int32(0))

    def absorb(seen: Part, step: Int[Array, ""], key: Array, value: Array) -> Part:
        def read() -> Part:
            return merge(seen, attention(query, key, value, step * num_tokens))

        return jax.lax.cond(step <= device, read, lambda: seen)  # else they stand behind the queries

    steps = num_steps(num_tokens, num_devices, window)
    return _rotate(in_float32(own), absorb, key, value, steps, axis)


def num_steps(num_tokens: int, num_devices: int, window: int | None) -> int:
    """How many devices' keys a query may have to read, its own device's included; `num_tokens` are on each."""
    return num_devices if window is None else min(num_devices, 1 + -(-(window - 1) // num_tokens))


def is_zigzag(num_tokens: int, num_devices: int, window: int | None) -> bool:
    """Whether zigzag order makes the busiest device do less: (2 n + 1) / 4 products of all tokens of two devices.

    In natural order it does one for every step but half of one for its own tokens.
    """
    return num_tokens % 2 == 0 and num_steps(num_tokens, num_devices, window) - 0.5 > (2 * num_devices + 1) / 4


def _in_zigzag(query: Array, key: Array, value: Array, attention: BlockAttention, axis: MeshAxes) -> Part:
    num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    block, last = query.shape[1] // 2, 2 * num_devices - 1
    (low, high), (low_key, high_key), (low_value, high_value) = (
        _to_zigzag(tokens, tokens_axis, axis) for tokens, tokens_axis in ((query, 1), (key, 2), (value, 2))
    )

    own_low = attention(low, low_key, low_value, jnp.int32(0))
    own_high = attention(high, high_key, high_value, jnp.int32(0))
    across = attention(high, low_key, low_value, (last - 2 * device) * block)
    seen = in_float32(own_low), merge(own_high, across)

    def absorb(seen: tuple[Part, Part], step: Int[Array, ""], key: tuple, value: tuple) -> tuple[Part, Part]:
        """The later queries read the other's earlier keys; and the device that stands later in a half reads there."""
        seen_low, seen_high = seen
        other = (device - step) % num_devices
        is_later = other < device

        def of_half(low: Array, high: Array) -> Array:
            return jnp.where(is_later, low, high)

        seen_high = merge(seen_high, attention(high, key[0], value[0], (last - device - other) * block))
        part = attention(of_half(low, high), of_half(*key), of_half(*value), jnp.abs(device - other) * block)
        both = merge(Part(*map(of_half, seen_low, seen_high)), part)
        return (
            Part(*(jnp.where(is_later, new, old) for new, old in zip(both, seen_low, strict=True))),
            Part(*(jnp.where(is_later, old, new) for new, old in zip(both, seen_high, strict=True))),
        )

    halves = _rotate(seen, absorb, (low_key, high_key), (low_value, high_value), num_devices, axis)
    (low_result, low_lse), (high_result, high_lse) = halves
    result = _from_zigzag(low_result.astype(query.dtype), high_result.astype(query.dtype), axis)
    return Part(result, _from_zigzag(low_lse, high_lse, axis))


def _rotate(seen, absorb, key, value, steps: int, axis: MeshAxes):
    """What has been seen once the keys and values of `steps` devices, the own ones included, have come by.

    The next ones travel while those that are here are read.
    """
    num_devices = jax.lax.axis_size(axis)
    to_next = [(device, (device + 1) % num_devices) for device in range(num_devices)]
    if steps == 1:
        return seen

    def step(index: Int[Array, ""], carry):
        seen, travelling = carry
        arriving = jax.lax.ppermute(travelling, axis, to_next)
        return absorb(seen, index, *travelling), arriving

    first = jax.lax.ppermute((key, value), axis, to_next)
    seen, last = jax.lax.fori_loop(1, steps - 1, step, (seen, first))
    return absorb(seen, jnp.int32(steps - 1), *last)


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
    """And back; the tokens are on axis 1."""
    num_devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    is_even, halves = device % 2 == 0, []
    for parity, block in enumerate((jnp.where(is_even, low, high), jnp.where(is_even, high, low))):
        back = [(there, here) for here, there in _destinations(num_devices, parity)]
        halves.append(jax.lax.ppermute(block, axis, back))
    return jnp.concatenate(halves, axis=1)
