"""What the host reads of arrays that may span several processes, and what it checks and settles between them.

With one process all of this is `np.asarray`, or nothing. With several a process holds only its own devices' parts, and
what it does not hold comes by a compiled program, which every process must run, like any other.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def to_host(tree: Any) -> Any:
    """The tree with whole NumPy arrays in place of JAX arrays, wherever their parts lie.

    Every process must call it with the same tree. Meant for small arrays: each device holds all of them for a moment.
    """
    leaves, structure = jax.tree.flatten(tree)
    spread = [index for index, leaf in enumerate(leaves) if not _is_readable(leaf)]
    if spread:
        gathered = _gather(tuple(_replicated(leaves[index]) for index in spread))(*(leaves[index] for index in spread))
        for index, leaf in zip(spread, gathered, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _is_readable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _replicated(leaf: jax.Array) -> NamedSharding:
    assert isinstance(leaf.sharding, NamedSharding)  # nothing else spans processes here
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


@cache
def _gather(shardings: tuple[NamedSharding, ...]) -> Any:
    """One program per set of layouts, kept so that the next block of tokens does not compile it again."""
    return jax.jit(lambda *arrays: arrays, out_shardings=shardings)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether the mesh holds devices of more than one process."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def check_same(mesh: Mesh | None, said: Mapping[str, str | bytes]) -> None:
    """Raises ValueError, in every process, when some process of the mesh says something else than its first one.

    Processes that were told different things would run different programs, and wait for each other for ever, or give
    nonsense. One small exchange; the names must be the same everywhere.
    """
    if mesh is None or not spans_processes(mesh):
        return
    texts = [text.encode() if isinstance(text, str) else text for text in said.values()]
    digests = np.stack([np.frombuffer(hashlib.sha256(text).digest(), np.uint32) for text in texts])
    everywhere = _from_all(mesh, digests)
    differs = np.any(everywhere != everywhere[:1], axis=2)  # [devices, names]
    if differs.any():
        processes = np.asarray([device.process_index for device in mesh.devices.flat])
        names = [name for name, wrong in zip(said, differs.any(axis=0), strict=True) if wrong]
        others = sorted(set(processes[differs.any(axis=1)].tolist()))
        raise ValueError(
            f"all processes must be given the same {', '.join(names)}: process {', '.join(map(str, others))} got "
            f"others than process {processes[0]}"
        )


def from_first(mesh: Mesh | None, values: Sequence[float]) -> list[float]:
    """The numbers as the mesh's first process has them, for what each measures and all must decide alike."""
    if mesh is None or not spans_processes(mesh):
        return list(values)
    bits = np.asarray(values, np.float64).view(np.uint32)  # devices may not hold 64-bit numbers
    return _from_all(mesh, bits)[0].view(np.float64).tolist()


def _from_all(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """[devices, ...]: what the process of each of the mesh's devices says."""
    devices = Mesh(mesh.devices.reshape(-1), ("devices",))
    layout = NamedSharding(devices, PartitionSpec("devices"))
    rows = jax.make_array_from_callback((devices.size, *values.shape), layout, lambda _: values[None])
    return to_host(rows)
