"""How many tokens one call of the compiled loop may write, so that it comes back often enough for Ctrl-C.

Python raises KeyboardInterrupt only between two calls. A call costs up to a millisecond beside the tokens, so it should
write many: as many as fit into half a second, by how long the last call took.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from decodax.decoding.compile_clock import compile_seconds
from decodax.sharding.host import spans_processes

CALL_SECONDS = 0.5
_MAX_GROWTH = 16  # from one call to the next: a measured time may be too short by accident
_SPANNING_TOKENS = 64  # a call of several processes: all must make the same calls, and measure different times


class Pace:
    """The length of the next call; the first one's comes from a forward of the prompt, than which a step is shorter."""

    def __init__(self, mesh: Mesh | None, prefill_forward_seconds: float) -> None:
        self._measures = not spans_processes(mesh)
        self.tokens = _SPANNING_TOKENS if not self._measures else _fitting(1, prefill_forward_seconds)

    @contextmanager
    def measured(self, max_tokens: int) -> Iterator[int]:
        """Around a call: gives the tokens that it may write, `max_tokens` at most, and takes its time."""
        tokens = min(self.tokens, max_tokens)
        start, compiled = time.perf_counter(), compile_seconds()
        yield tokens
        if self._measures:
            seconds = time.perf_counter() - start - (compile_seconds() - compiled)
            self.tokens = min(_fitting(tokens, seconds), _MAX_GROWTH * tokens)


def _fitting(tokens: int, seconds: float) -> int:
    """How many tokens take CALL_SECONDS where so many took so long."""
    return max(1, min(int(tokens * CALL_SECONDS / max(seconds, 1e-6)), 1 << 20))
