"""Cuts text into the rows of each training step, in random order, computed from the step alone.

A resumed run therefore reads what it would have read. One pass concatenates all documents in random order, each after
a separator, and cuts the result into windows, which are drawn in random order.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from decodax.decoding.training.plan import Plan


class TextWindows:
    """The training rows of any step: a few windows, uncut or (up to the plan's `long_from`) cut into shorter rows.

    always: token ids of the documents that every pass reads.
    rotating: those of which each pass reads another share, `rotating_share`.
    separator: the ids before every document, often the model's end token.
    Mutable: it remembers where its passes begin and the windows of the latest.
    """

    def __init__(
        self,
        always: Sequence[np.ndarray],
        plan: Plan,
        *,
        rotating: Sequence[np.ndarray] = (),
        rotating_share: float = 0.0,
        separator: Sequence[int] = (),
    ) -> None:
        self._documents = [np.concatenate([separator, ids]).astype(np.int32) for ids in (*always, *rotating)]
        self._num_always, self._rotating_share, self._plan = len(always), rotating_share, plan
        self._passes: list[tuple[int, int]] = []  # first window of each pass so far, windows in it
        self._latest: tuple[int, np.ndarray] | None = None
        num_tokens = sum(map(len, self._documents[: len(always)]))
        if num_tokens <= plan.tokens_per_step:
            raise ValueError(
                f"the text must hold more tokens than one step reads ({plan.tokens_per_step}), got {num_tokens}: give "
                "more text, a smaller batch or shorter windows"
            )

    def at(self, step: int) -> Int[np.ndarray, "B T_plus_1"]:
        """The rows of a step, each one token longer than the model's input: labels are the inputs moved by one."""
        plan = self._plan
        first = step * plan.windows_per_step
        windows = [self._window(index) for index in range(first, first + plan.windows_per_step)]
        if step >= plan.long_from:
            return np.stack(windows)
        size = plan.short_tokens
        return np.stack([row[i : i + size + 1] for row in windows for i in range(0, plan.window_tokens, size)])

    def one_pass(self, number: int) -> Int[np.ndarray, "W T_plus_1"]:
        """All windows of a pass over the text, in the order in which they are read."""
        random = np.random.default_rng([self._plan.seed, number])
        period = max(1, round(1 / self._rotating_share)) if self._rotating_share else 0
        rotating = range(self._num_always + number % period, len(self._documents), period) if period else ()
        order = random.permutation([*range(self._num_always), *rotating])
        stream = np.concatenate([self._documents[i] for i in order])
        stream = np.roll(stream, random.integers(len(stream)))
        windows = cut(stream, self._plan.window_tokens)
        return windows[random.permutation(len(windows))]

    def _window(self, index: int) -> Int[np.ndarray, " T_plus_1"]:
        number = next((i for i, (first, count) in enumerate(self._passes) if first <= index < first + count), None)
        while number is None:
            first = sum(self._passes[-1]) if self._passes else 0
            self._latest = (len(self._passes), self.one_pass(len(self._passes)))
            self._passes.append((first, len(self._latest[1])))
            number = self._latest[0] if index < sum(self._passes[-1]) else None
        if self._latest is None or self._latest[0] != number:
            self._latest = (number, self.one_pass(number))
        return self._latest[1][index - self._passes[number][0]]


def cut(stream: Int[np.ndarray, " S"], size: int) -> Int[np.ndarray, "W T_plus_1"]:
    """All full windows of a stream, one after the other, each with the token that follows it.

    >>> cut(np.arange(8), 3).tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    count = (len(stream) - 1) // size
    if count < 1:
        raise ValueError(f"a window of {size} tokens and the one after it need {size + 1}, got {len(stream)}")
    return np.lib.stride_tricks.sliding_window_view(stream, size + 1)[: count * size : size]
