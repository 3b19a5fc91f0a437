"""Splits ragged work into equal runs, so that every core of a GPU is busy for as long as the others.

The tiles of all owners (an owner is what one softmax runs over: a row, a key-value head, a group of queries) stand in
one linear order, which is cut into runs of equal length; a run may end in the middle of an owner. What a run has seen
of an owner is a part, written to a slot of its own; afterwards an owner's parts are merged. LeanAttention (arXiv
2405.10480), from which it departs in that the merge is a second kernel instead of a wait for other cores' locks.

Owner o's part in run w has slot o + w: along the linear order every next part has a larger owner, a larger run or both,
so no two parts share a slot, and an owner's parts lie side by side.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["Partition", "num_slots", "partition"]


class Partition(NamedTuple):
    """Run w does the tiles start[w] .. start[w + 1] - 1, of which the first is of owner first_owner[w] (if any).

    Owner o's tiles are offset[o] .. offset[o + 1] - 1, and its parts lie in the slots first_part[o] ..
    first_part[o] + num_parts[o] - 1 (none if it has no tiles).
    """

    start: Int[Array, " runs_and_one"]
    first_owner: Int[Array, " runs"]
    offset: Int[Array, " owners_and_one"]
    first_part: Int[Array, " owners"]
    num_parts: Int[Array, " owners"]


def num_slots(num_owners: int, num_runs: int) -> int:
    """Room for all parts."""
    return num_owners + num_runs - 1


def partition(num_tiles: Int[Array, " owners"], num_runs: int) -> Partition:
    """Cuts the tiles of all owners into `num_runs` runs whose lengths differ by at most one."""
    if num_runs < 1:
        raise ValueError(f"work must be split into at least one run, got num_runs={num_runs}")
    num_owners = num_tiles.shape[0]
    offset = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_tiles, dtype=jnp.int32)])
    shorter, num_longer = offset[-1] // num_runs, offset[-1] % num_runs
    run = jnp.arange(num_runs + 1, dtype=jnp.int32)
    start = run * shorter + jnp.minimum(run, num_longer)
    ended = offset[None, 1:] <= start[:-1, None]
    first_owner = jnp.minimum(jnp.sum(ended, axis=1, dtype=jnp.int32), num_owners - 1)

    def run_of(tile: Array) -> Array:
        end_of_longer = num_longer * (shorter + 1)
        in_shorter = num_longer + (tile - end_of_longer) // jnp.maximum(shorter, 1)
        return jnp.where(tile < end_of_longer, tile // (shorter + 1), in_shorter)

    first_run, last_run = run_of(offset[:-1]), run_of(offset[1:] - 1)
    first_part = jnp.arange(num_owners, dtype=jnp.int32) + first_run
    num_parts = jnp.where(num_tiles > 0, last_run - first_run + 1, 0)
    return Partition(start, first_owner, offset, first_part, num_parts)
