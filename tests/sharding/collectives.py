"""Lists the collectives of a compiled program, for tests."""

from typing import Any

from decodax.planning.hlo import KINDS, ProgramCollective, collectives_of


def collectives(compiled: Any) -> list[ProgramCollective]:
    """Every collective of the program, once, inside a loop or not."""
    return collectives_of(compiled.as_text())


def count(compiled: Any) -> dict[str, int]:
    """How many collectives of each kind the program has."""
    kinds = [collective.kind for collective in collectives(compiled)]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
