"""Runs the compiled loop from the host: in calls short enough for Ctrl-C, with the times and counts of what ran."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS
from decodax.decoding.compile_clock import compile_seconds
from decodax.decoding.pace import Pace
from decodax.decoding.ready_strategy import ReadyStrategy
from decodax.decoding.sizes import chunk_tokens
from decodax.decoding.state import DecodeState
from decodax.models.layer_kernels import LayerKernel, layer_kernels
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

UNLIMITED = int(np.iinfo(np.int32).max)


class Clock:
    """Laps of wall-clock time without the time of compiling."""

    def __init__(self) -> None:
        self.compiled = 0.0
        self._start, self._compile_start = time.perf_counter(), compile_seconds()

    def lap(self) -> float:
        now, compile_now = time.perf_counter(), compile_seconds()
        wall, compiled = now - self._start, compile_now - self._compile_start
        self._start, self._compile_start = now, compile_now
        self.compiled += compiled
        return max(wall - compiled, 0.0)


def decode_block(plan: ReadyStrategy, state: DecodeState, max_tokens: int, pace: Pace) -> DecodeState:
    """Runs the loop until all rows are done or one has `max_tokens` more, in calls short enough for Ctrl-C.

    The length of the calls does not change the result: each continues from the state in which the last one stopped.
    """
    begin, left, done = to_host(state.length), max_tokens, False
    while left > 0 and not done:
        with pace.measured(left) as tokens:
            state = plan.decode(state, np.int32(tokens))
            lengths, rows_done = to_host((state.length, state.done))
        left, done = max_tokens - int(np.max(lengths - begin)), bool(np.all(rows_done))
    return state


def kernels_of(
    lm: "LanguageModel", plan: ReadyStrategy, state: DecodeState, prompt_tokens: int
) -> tuple[LayerKernel, ...]:
    batch, capacity = state.tokens.shape
    chunk = chunk_tokens(prompt_tokens, MAX_CHUNK_TOKENS, lm.model.execution)
    return layer_kernels(lm.model, lm.dtype, batch, chunk, plan.step_tokens, capacity)


def draft_counts_of(state: DecodeState) -> dict[str, Any]:
    """The counts of drafts as plain numbers, none for a strategy that does not draft."""
    if state.counts is None:
        return {}
    counts = to_host(state.counts)
    return {
        "draft_forwards": int(counts.num_draft_forwards),
        "accepted_lengths": tuple(map(int, counts.accepted_lengths)),
        "proposed": tuple(map(int, counts.proposed)),
        "accepted": tuple(map(int, counts.accepted)),
    }
