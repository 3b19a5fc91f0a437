"""Finds where a text begins to repeat itself, to leave repetitions, which are easy to draft, out of an acceptance.

A row loops if one run of four tokens occurs at least four times within 64 consecutive new tokens. Such a row counts up
to the first of the four: the rounds (forwards of the target) that ended by then, and their tokens. A row that does not
loop counts in full.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

RUN_TOKENS, TIMES, WITHIN_TOKENS = 4, 4, 64


class PerForward(NamedTuple):
    """Counts summed over rows.

    rounds: of each row.
    looping_rows: how many of the rows loop.
    """

    tokens: int
    rounds: int
    rows: int
    looping_rows: int

    @property
    def tokens_per_forward(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None


def loop_start(tokens: Sequence[int] | Int[np.ndarray, " A"]) -> int | None:
    """How many tokens come before the row repeats itself, None where it does not.

    >>> loop_start([9, 8] + [1, 2, 3, 4] * 4), loop_start([1, 2, 3, 4] * 3)
    (6, None)
    """
    ends: dict[tuple[int, ...], deque[int]] = defaultdict(deque)
    ids = [int(token) for token in tokens]
    for end in range(RUN_TOKENS, len(ids) + 1):
        seen = ends[tuple(ids[end - RUN_TOKENS : end])]
        seen.append(end)
        while seen[0] - RUN_TOKENS < end - WITHIN_TOKENS:
            seen.popleft()
        if len(seen) >= TIMES:
            return seen[0]
    return None


def last_rounds(new: Int[np.ndarray, "B A"], ends: Int[np.ndarray, "rounds B"], *, without_loops: bool) -> list[int]:
    """The last round of each row that counts: the first after which it has all tokens that do."""
    found = []
    for row, ids in enumerate(new):
        start = loop_start(ids) if without_loops else None
        last = len(ids) if start is None else start
        found.append(int(np.flatnonzero(ends[:, row] <= last)[-1]))
    return [int(np.flatnonzero(ends[:, row] == ends[end, row])[0]) for row, end in enumerate(found)]


def counted(new: Int[np.ndarray, "B A"], ends: Int[np.ndarray, "rounds B"], *, without_loops: bool) -> PerForward:
    """Sums over the rows of a trace (`ends[r, b]`: new tokens of row b after round r)."""
    rounds = last_rounds(new, ends, without_loops=without_loops)
    tokens = sum(int(ends[end, row]) for row, end in enumerate(rounds))
    looping = sum(loop_start(ids) is not None for ids in new)
    return PerForward(tokens, sum(rounds), len(new), looping)


def summed(counts: Sequence[PerForward]) -> PerForward:
    return PerForward(*(sum(values) for values in zip(*counts, strict=True)))
