"""Gives functions that run kernels, which have no gradients of their own, those of plain JAX."""

from collections.abc import Callable
from typing import Any

import jax


def with_gradients_of(plain: Callable[..., Any], in_kernels: Callable[..., Any]) -> Callable[..., Any]:
    """`in_kernels` with the gradients of `plain`, which computes the same in JAX; both take trees, by position."""

    @jax.custom_vjp
    def function(*operands: Any) -> Any:
        return in_kernels(*operands)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return in_kernels(*operands), operands

    def backward(operands: Any, cotangents: Any) -> Any:
        return jax.vjp(plain, *operands)[1](cotangents)

    function.defvjp(forward, backward)
    return function
