"""Gathers arrays that may span several processes on the host, and checks that all processes agree on arguments.

With one process this is `np.asarray`, or nothing. With several, a process holds only the shards of its own devices; a
compiled program, which every process must run, gathers the others.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def to_host(tree: Any) -> Any:
    """The tree with gathered NumPy arrays in place of JAX arrays, however those are sharded.

    Every process must call it with the same tree. Meant for small arrays: each device briefly holds all of them.
    """
    leaves, structure = jax.tree.flatten(tree)
    sharded = [index for index, leaf in enumerate(leaves) if not _is_readable(leaf)]
    if sharded:
        gather = _gather(tuple(_replicated(leaves[index]) for index in sharded))
        gathered = gather(*(leaves[index] for index in sharded))
        for index, leaf in zip(sharded, gathered, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _is_readable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _replicated(leaf: jax.Array) -> NamedSharding:
    assert isinstance(leaf.sharding, NamedSharding)  # nothing else spans processes here
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


@cache
def _gather(shardings: tuple[NamedSharding, ...]) -> Any:
    """One program per set of shardings, cached so that the next block of tokens does not recompile it."""
    return jax.jit(lambda *arrays: arrays, out_shardings=shardings)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether the mesh holds devices of more than one process."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def assert_same_on_all_processes(mesh: Mesh | None, fingerprint: Mapping[str, str | bytes]) -> None:
    """Checks that all processes of the mesh were given the same values; the names must be the same everywhere.

    Processes with different values would run different programs, and wait for each other for ever, or give wrong
    results. Costs one small all-gather.
    Raises ValueError, in every process, when some process differs from the first one.
    """
    if mesh is None or not spans_processes(mesh):
        return
    texts = [text.encode() if isinstance(text, str) else text for text in fingerprint.values()]
    digests = np.stack([np.frombuffer(hashlib.sha256(text).digest(), np.uint32) for text in texts])
    from_all = _from_all_processes(mesh, digests)
    differs = np.any(from_all != from_all[:1], axis=2)  # [devices, names]
    if differs.any():
        processes = np.asarray([device.process_index for device in mesh.devices.flat])
        names = [name for name, is_other in zip(fingerprint, differs.any(axis=0), strict=True) if is_other]
        others = sorted(set(processes[differs.any(axis=1)].tolist()))
        raise ValueError(
            f"all processes must be given the same {', '.join(names)}: process {', '.join(map(str, others))} got "
            f"others than process {processes[0]}"
        )


def from_first(mesh: Mesh | None, values: Sequence[float]) -> list[float]:
    """The numbers of the mesh's first process, so that all processes decide alike by what each has measured."""
    if mesh is None or not spans_processes(mesh):
        return list(values)
    bits = np.asarray(values, np.float64).view(np.uint32)  # devices may not hold 64-bit numbers
    return _from_all_processes(mesh, bits)[0].view(np.float64).tolist()


def _from_all_processes(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """The values of every process: [devices, ...], those of each device's process."""
    devices = Mesh(mesh.devices.reshape(-1), ("devices",))
    sharding = NamedSharding(devices, PartitionSpec("devices"))
    stacked = jax.make_array_from_callback((devices.size, *values.shape), sharding, lambda _: values[None])
    return to_host(stacked)
