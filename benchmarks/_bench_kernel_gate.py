"""Checks that a kernel computes what its reference does: no speed is reported of one that does not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_LOG_SUM_EXP = ("flash_prefill", "flash_decode", "paged_decode", "block_sparse_prefill", "gather_decode", "mla_decode")


def tolerance(dtype: Any) -> float:
    """How far an output may be from the reference's, over the largest one.

    Both round the output to `dtype`, and may round weights of the sum before, each by half a unit in the last place:
    four units for all of it. Sums are in float32, in another order: 1e-5.
    """
    return 4 * float(jnp.finfo(dtype).eps) + 1e-5


def lse_tolerance(options: Mapping[str, Any]) -> float:
    """The same for log-sum-exps, over 1 + the largest one: float32 sums of float32 exponentials, which nothing rounds.

    1e-4 leaves room for a GPU's approximate exponentials. Its approximate hyperbolic tangent is off by up to 2^-11 (PTX
    manual, tanh.approx), and that times the soft-cap is in every score.
    """
    return 1e-4 + 2**-11 * (options.get("softcap") or 0.0)


def gate(kernel: str, dtype: Any, options: Mapping[str, Any], got: Any, expected: Any) -> list[dict[str, Any]]:
    """For each output: the largest `difference`, over the largest of the reference, the `tolerance`, and if it `holds`.

    Infinities must be in the same places, and NaN nowhere.
    """
    checked = []
    for index, (ours, theirs) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)):
        is_lse = kernel in _LOG_SUM_EXP and index == 1
        allowed = lse_tolerance(options) if is_lse else tolerance(dtype)
        difference = float(_difference(ours, theirs, jnp.float32(1.0 if is_lse else 0.0)))
        checked.append({"difference": difference, "tolerance": allowed, "holds": bool(difference <= allowed)})
    return checked


@jax.jit
def _difference(ours: jax.Array, theirs: jax.Array, floor: jax.Array) -> jax.Array:
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    finite = jnp.isfinite(theirs)
    largest = jnp.max(jnp.where(finite, jnp.abs(theirs), 0.0)) + floor
    apart = jnp.where(finite, jnp.abs(ours - theirs), jnp.where(ours == theirs, 0.0, jnp.inf))
    apart = jnp.where(jnp.isnan(apart), jnp.inf, apart)
    return jnp.max(apart, initial=0.0) / jnp.where(largest > 0, largest, 1.0)


def is_open(checked: list[dict[str, Any]]) -> bool:
    return all(output["holds"] for output in checked)


def words(checked: list[dict[str, Any]]) -> str:
    """The gate's outcome in a line."""
    outputs = [f"{output['difference']:.1e} (at most {output['tolerance']:.1e})" for output in checked]
    return f"{'holds' if is_open(checked) else 'FAILS'}: off by {', '.join(outputs)}"
