"""Chooses how many tokens one call of the compiled loop may emit, so that it returns often enough for Ctrl-C.

Python raises KeyboardInterrupt only between two calls. A call costs up to a millisecond besides the tokens, so it
should emit many: as many as fit into half a second, judged by the time of the last call.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from decodax.decoding.compile_clock import compile_seconds
from decodax.sharding.host import spans_processes

CALL_SECONDS = 0.5
_MAX_GROWTH = 16  # from one call to the next: a measured time may be too short by chance
_SPANNING_TOKENS = 64  # over several processes, which must make the same calls but measure different times


class Pace:
    """The length of the next call; that of the first comes from a prefill forward, which takes longer than a step."""

    def __init__(self, mesh: Mesh | None, prefill_forward_seconds: float) -> None:
        self._measures = not spans_processes(mesh)
        self.tokens = _SPANNING_TOKENS if not self._measures else _fitting(1, prefill_forward_seconds)

    @contextmanager
    def measured(self, max_tokens: int) -> Iterator[int]:
        """Wraps a call: yields the tokens that it may emit, `max_tokens` at most, and measures its time."""
        tokens = min(self.tokens, max_tokens)
        start, compiled = time.perf_counter(), compile_seconds()
        yield tokens
        if self._measures:
            seconds = time.perf_counter() - start - (compile_seconds() - compiled)
            self.tokens = min(_fitting(tokens, seconds), _MAX_GROWTH * tokens)


def _fitting(tokens: int, seconds: float) -> int:
    """How many tokens take CALL_SECONDS if `tokens` took `seconds`."""
    return max(1, min(int(tokens * CALL_SECONDS / max(seconds, 1e-6)), 1 << 20))
