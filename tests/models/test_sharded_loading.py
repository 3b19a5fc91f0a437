"""Sharded loading gives every device its slice, reads each slice once, and reads no other process's slices."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from decodax.models.checkpoints import reading
from decodax.models.checkpoints.reading import load_params, open_params
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.models.configs.hf_config import load_config
from tests.golden_files import golden_cases, load_golden

MESH = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def split(weight, path):
    """Sharded over as many axes as divide by two, so that weights are split by rows, by columns or not at all."""
    axes = [axis if size % 2 == 0 else None for axis, size in zip("abc", weight.shape, strict=False)]
    return NamedSharding(MESH, PartitionSpec(*axes))


def load(folder, **options):
    family, config = load_config(folder)
    return load_params(folder, family, config, dtype=np.dtype(np.float32), **options)


@pytest.fixture
def reads(monkeypatch):
    """Records what is read: (path, region, the host array)."""
    seen, read = [], reading.StoredWeights.read

    def record(self, path, region, dtype):
        host = read(self, path, region, dtype)
        seen.append((path, region, host))
        return host

    monkeypatch.setattr(reading.StoredWeights, "read", record)
    return seen


@pytest.mark.parametrize("name", golden_cases())
@pytest.mark.quick_cases(12)
def test_every_device_has_its_slice(name):
    folder = load_golden(name).folder
    replicated, sharded = load(folder), load(folder, sharding_of=split)
    jax.tree.map(np.testing.assert_array_equal, replicated, sharded)
    cut = 0
    for one, leaf in zip(jax.tree.leaves(replicated), jax.tree.leaves(sharded), strict=True):
        assert leaf.sharding.mesh == MESH
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(one)[shard.index])
            cut += shard.data.shape != one.shape
    assert cut > 8


def test_a_slice_is_read_once_and_nothing_else_is(reads):
    folder = load_golden("llama").folder
    params = load(folder, sharding_of=split)
    for path, region, host in reads:
        leaf = params
        for name in path:
            leaf = leaf[name]
        holders = [
            shard for shard in leaf.addressable_shards if (*(slice(*part.indices(size)[:2]) for part, size in
            zip(shard.index, leaf.shape, strict=True)),) == region
        ]  # fmt: skip
        assert len(holders) == 8 // (2 ** sum(size % 2 == 0 for size in leaf.shape))
        assert {shard.data.unsafe_buffer_pointer() for shard in holders} == {host.ctypes.data}  # nothing was copied
    assert len({(path, str(region)) for path, region, _ in reads}) == len(reads)
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(host.nbytes for _, _, host in reads) == own


def test_progress_counts_bytes_read():
    reports = []
    params = load(
        load_golden("qwen3").folder, sharding_of=split, progress=lambda done, total: reports.append((done, total))
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert reports[-1] == (total, total) and len(reports) == len(jax.tree.leaves(params))


PROCESS = """
    import sys, jax, numpy as np
    from pathlib import Path
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from decodax.models.checkpoints import reading
    from decodax.models.configs.hf_config import load_config

    index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    family, config = load_config(folder)
    whole = reading.load_params(folder, family, config, dtype=np.dtype(np.float32))
    seen, read = [], reading.StoredWeights.read

    def record(self, path, region, dtype):
        seen.append(np.prod([part.stop - part.start for part in region]))
        return read(self, path, region, dtype)

    reading.StoredWeights.read = record
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    halves = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def split(weight, path):
        if weight.shape[0] % 4 == 0:
            return NamedSharding(mesh, PartitionSpec("a"))
        return NamedSharding(halves, PartitionSpec("a" if weight.shape[0] % 2 == 0 else None))

    params = reading.load_params(folder, family, config, dtype=np.dtype(np.float32), sharding_of=split)
    for one, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert len(leaf.addressable_shards) == 2
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(one)[shard.index])
    print("read", sum(seen), "of", sum(leaf.size for leaf in jax.tree.leaves(whole)))
"""


def test_a_process_reads_its_own_shards(tmp_path, unused_port):
    """Two processes with two devices each: what divides in two is read by halves, from both formats."""
    from_hf(load_golden("llama_tied").folder, tmp_path / "orbax")
    script = textwrap.dedent(PROCESS)
    command = [sys.executable, "-c", script]
    for folder in (load_golden("llama_tied").folder, tmp_path / "orbax"):
        processes = [
            subprocess.Popen([*command, str(i), str(unused_port), str(folder)], stdout=-1, stderr=-1, text=True)
            for i in range(2)
        ]
        outputs = [process.communicate(timeout=300) for process in processes]
        assert all(process.returncode == 0 for process in processes), outputs
        family, config = load_config(folder)
        weights = open_params(folder, family, config).weights.values()
        total = sum(int(np.prod(weight.shape)) for weight in weights)
        own = sum(int(np.prod(weight.shape)) // (2 if weight.shape[0] % 2 == 0 else 1) for weight in weights)
        assert [output.split("\n")[-2] for output, _ in outputs] == [f"read {own} of {total}"] * 2


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
