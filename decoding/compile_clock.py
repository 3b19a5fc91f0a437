"""Measures the seconds that a thread spends compiling, so that they are not counted as the speed of the model."""

import threading

from jax import monitoring

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_of_thread = threading.local()


def _listen(event: str, duration_secs: float, **_: object) -> None:
    if event in _EVENTS:
        add_compile_seconds(duration_secs)


monitoring.register_event_duration_secs_listener(_listen)


def add_compile_seconds(seconds: float) -> None:
    """Counts seconds in which this thread waited for another one to compile."""
    _of_thread.seconds = compile_seconds() + seconds


def compile_seconds() -> float:
    """Seconds that this thread has spent tracing, lowering and compiling so far; take the difference of two calls."""
    return getattr(_of_thread, "seconds", 0.0)
