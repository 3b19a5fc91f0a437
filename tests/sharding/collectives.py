"""What a compiled program sends: its collectives, by kind, and the bytes of what each leaves on a device."""

import re
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


class Collective(NamedTuple):
    kind: str
    num_bytes: int
    line: str


def collectives(compiled: Any) -> list[Collective]:
    """Every collective of the program, once, be it in a loop or not."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match is not None:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [
                BYTES[dtype] * np.prod([int(size) for size in shape.split(",") if size]) for dtype, shape in shapes
            ]
            found.append(Collective(match[2], int(sum(sizes)), line.strip()[:300]))
    return found


def count(compiled: Any) -> dict[str, int]:
    """How many collectives of each kind the program has."""
    kinds = [collective.kind for collective in collectives(compiled)]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
