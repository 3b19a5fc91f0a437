"""Ragged work is split into equal runs: every tile once, in balance, every partial result in a slot of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.kernels_pallas.decode.partition import num_slots, partition

RAGGED = [[1, 1, 9, 64, 0], [0, 0, 0], [0, 3, 0, 0, 1, 0], [5], [2, 2, 2, 2], [0, 0, 7]]


@pytest.mark.parametrize("num_tiles", RAGGED, ids=str)
def test_every_tile_once_and_in_balance(num_tiles):
    split = jax.jit(partition, static_argnums=1)
    total = sum(num_tiles)
    owner_of_tile = np.repeat(np.arange(len(num_tiles)), num_tiles)
    for num_runs in range(1, 9):
        runs = jax.tree.map(np.asarray, split(jnp.asarray(num_tiles, jnp.int32), num_runs))
        lengths = np.diff(runs.start)
        assert runs.start[0] == 0 and runs.start[-1] == total
        assert lengths.max() - lengths.min() <= 1
        slots = {}
        for run in range(num_runs):
            tiles = range(runs.start[run], runs.start[run + 1])
            if tiles:
                assert runs.first_owner[run] == owner_of_tile[tiles[0]]
            assert 0 <= runs.first_owner[run] < len(num_tiles)
            for tile in tiles:
                slots.setdefault((owner_of_tile[tile], run), []).append(tile)
        taken = [owner + run for owner, run in slots]
        assert len(set(taken)) == len(taken) and all(slot < num_slots(len(num_tiles), num_runs) for slot in taken)
        for owner, count in enumerate(num_tiles):
            assert runs.offset[owner + 1] - runs.offset[owner] == count
            expected = sorted(slot_owner + run for slot_owner, run in slots if slot_owner == owner)
            first = runs.first_partial[owner]
            assert expected == list(range(first, first + runs.num_partials[owner]))


def test_work_for_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one run, got num_runs=0"):
        partition(jnp.ones(2, jnp.int32), 0)
