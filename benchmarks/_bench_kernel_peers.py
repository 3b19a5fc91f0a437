"""Runs the peers of the kernels on the same operands: cuDNN's attention and XLA's ragged product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._bench_kernel_cases import Case

Peer = tuple[Callable[[Any], Any], Any]  # the function, and its operands


def peers(case: Case, operands: dict[str, Any]) -> dict[str, Peer]:
    """The peers that can do what the case asks for, by name; what they return is the kernel's first output."""
    makers = {"flash_prefill": _cudnn, "grouped_matmul": _ragged_dot}
    found = makers[case.kernel](case, operands) if case.kernel in makers else None
    return {} if found is None else dict([found])


def _cudnn(case: Case, operands: dict[str, Any]) -> tuple[str, Peer] | None:
    """Causal attention of a whole prompt, with tokens before heads, as cuDNN takes them."""
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    options = case.shape.options()
    plain = not (options["window"] or options["softcap"] or "sink_logits" in operands)
    whole = query.shape[1] == key.shape[2] and not jnp.any(operands["offset"]) and key.shape == value.shape
    if jax.default_backend() != "gpu" or not (plain and whole and jnp.all(operands["length"] == key.shape[2])):
        return None
    scale = options["scale"]

    def attend(operands: Any) -> Any:
        return jax.nn.dot_product_attention(*operands, is_causal=True, scale=scale, implementation="cudnn")

    return "cudnn", (attend, (query, *(jnp.swapaxes(array, 1, 2) for array in (key, value))))


def _ragged_dot(case: Case, operands: dict[str, Any]) -> tuple[str, Peer]:
    """XLA's own grouped product, with weights in its order."""
    weight = jnp.swapaxes(operands["weight"], 1, 2)

    def product(operands: Any) -> Any:
        return jax.lax.ragged_dot(*operands, precision=jax.lax.Precision.DEFAULT)

    return "ragged_dot", (product, (operands["tokens"], weight, operands["group_sizes"]))
