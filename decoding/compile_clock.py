"""Measures the seconds that JAX spends compiling, so that they are not counted as the speed of the model."""

from jax import monitoring

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_total_seconds = 0.0


def _listen(event: str, duration_secs: float, **_: object) -> None:
    global _total_seconds
    if event in _EVENTS:
        _total_seconds += duration_secs


monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that this process has spent tracing, lowering and compiling so far; take the difference of two calls."""
    return _total_seconds
