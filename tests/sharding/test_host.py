"""Host reads and agreement between processes, in one process; test_two_processes.py has two."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from decodax.sharding.host import assert_same_on_all_processes, from_first, spans_processes, to_host
from decodax.sharding.mesh import read_mesh


def test_trees_become_numpy_whatever_their_sharding():
    mesh = read_mesh("tensor=4,data=2")
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = {
        "split": jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("tensor", "data"))),
        "here": (jax.numpy.asarray(numbers[0]), numbers[1], np.int32(3)),
        "none": None,
    }
    found = to_host(tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["split"], numbers)
    np.testing.assert_array_equal(found["here"][0], numbers[0])
    assert found["none"] is None and found["here"][2] == 3


@pytest.mark.parametrize("mesh", [None, "data=8"])
def test_one_process_agrees_with_itself(mesh: str | None):
    placed = None if mesh is None else read_mesh(mesh)
    assert not spans_processes(placed)
    assert_same_on_all_processes(placed, {"prompts": b"x"})
    assert from_first(placed, [0.1, 2.5]) == [0.1, 2.5]
