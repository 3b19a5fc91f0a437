"""Reads the collectives of a compiled program from its HLO text: their kinds, numbers, devices and bytes."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_NAME = re.compile(r'op_name="([^"]*)"')
_LAYER = re.compile(r"/blocks_(\d+)/")
_BY_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_BY_SHAPE = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_BY_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class ProgramCollective(NamedTuple):
    """One collective of a program.

    kind: one of KINDS.
    num_bytes: of its result on one device.
    devices: in each group, None for all.
    operation: the JAX operation it comes from, as "jit(decode)/while/body/...".
    """

    kind: str
    num_bytes: int
    devices: int | None
    operation: str

    @property
    def layer(self) -> int | None:
        """The layer of the model that it belongs to, if its operation names one."""
        found = _LAYER.search(self.operation)
        return None if found is None else int(found[1])


def collectives_of(text: str) -> list[ProgramCollective]:
    """Every collective in the order of the text; an asynchronous one is listed by its start.

    >>> line = "  %r = bf16[8,4]{1,0} all-reduce(%x), replica_groups=[2,8]<=[16], metadata={op_name=\\"jit(f)/dot\\"}"
    >>> collectives_of(line)
    [ProgramCollective(kind='all-reduce', num_bytes=64, devices=8, operation='jit(f)/dot')]
    """
    return list(_collectives(text))


def _collectives(text: str) -> Iterator[ProgramCollective]:
    for match in _LINE.finditer(text):
        rest = text[match.end() : text.find("\n", match.end()) % (len(text) + 1)]
        name = _NAME.search(rest)
        arrays = [_num_bytes(*array) for array in _ARRAY.findall(match[1])]
        # An asynchronous start returns its operands beside its results; a permute also two counters.
        num_bytes = max(arrays) if match[3] and match[2] != "all-reduce" else sum(arrays)
        yield ProgramCollective(match[2], num_bytes, _devices(rest), name[1] if name else "")


def _num_bytes(kind: str, sizes: str) -> int:
    bits = 8 if kind == "pred" else int(_BITS.search(kind)[0])  # type: ignore[index]
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _devices(rest: str) -> int | None:
    if by_mesh := _BY_MESH.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", by_mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", by_mesh[2]))
    if by_shape := _BY_SHAPE.search(rest):
        return int(by_shape[2])
    if by_list := _BY_LIST.search(rest):
        return len(by_list[1].split(","))
    return None
