"""Splits ragged attention work into runs of equal length, so that all cores of a GPU finish at the same time.

The tiles of all owners (an owner is one softmax: a row, a key-value head, a group of queries) are put in one linear
order, which is cut into runs of equal length; a run may end inside an owner. A run's result for an owner is a partial
softmax, written to a slot of its own; afterwards an owner's partial softmaxes are merged. LeanAttention (arXiv
2405.10480), from which it departs in that the merge is a second kernel instead of a wait for other cores' locks.

Owner o's partial softmax of run w has slot o + w: in the linear order each next one has a larger owner, a larger run or
both, so no two share a slot, and an owner's slots are adjacent.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["Partition", "num_slots", "partition"]


class Partition(NamedTuple):
    """The split of all tiles into runs.

    start: run w does the tiles start[w] .. start[w + 1] - 1.
    first_owner: owner of a run's first tile (if any).
    offset: owner o's tiles are offset[o] .. offset[o + 1] - 1.
    first_partial: slot of an owner's first partial softmax.
    num_partials: number of an owner's partial softmaxes, in adjacent slots (0 if it has no tiles).
    """

    start: Int[Array, " runs_and_one"]
    first_owner: Int[Array, " runs"]
    offset: Int[Array, " owners_and_one"]
    first_partial: Int[Array, " owners"]
    num_partials: Int[Array, " owners"]


def num_slots(num_owners: int, num_runs: int) -> int:
    """Number of slots for all partial softmaxes."""
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
    first_partial = jnp.arange(num_owners, dtype=jnp.int32) + first_run
    num_partials = jnp.where(num_tiles > 0, last_run - first_run + 1, 0)
    return Partition(start, first_owner, offset, first_partial, num_partials)
