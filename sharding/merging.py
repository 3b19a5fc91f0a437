"""Merges parts of one softmax: attention over some of the keys, and over others, into attention over all of them.

A part is what queries mix from its keys, and the log-sum-exp of their scores there; a part in which a query reads
nothing has the log-sum-exp -inf. With lse = log sum_i exp(lse_i), the whole is sum_i exp(lse_i - lse) output_i: the
online softmax of FlashAttention-2 (arXiv 2307.08691), over devices or over time. Merged parts are float32, as sums are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

MeshAxes = str | tuple[str, ...]


class Part(NamedTuple):
    output: Float[Array, "B T N I"]
    lse: Float32[Array, "B T N"]


def in_float32(part: Part) -> Part:
    """As parts are merged."""
    return Part(part.output.astype(jnp.float32), part.lse)


def merge(one: Part, other: Part) -> Part:
    """Two parts as one. One whose log-sum-exp is NaN breaks the whole, whatever its output says."""
    read_nothing = (other.lse == -jnp.inf) & ~jnp.isnan(one.lse)
    share = jnp.where(read_nothing, 1.0, jax.nn.sigmoid(one.lse - other.lse))[..., None]
    output = one.output.astype(jnp.float32) * share + other.output.astype(jnp.float32) * (1 - share)
    return Part(output, jnp.logaddexp(one.lse, other.lse))


def merge_stack(output: Float[Array, "B parts T N I"], lse: Float32[Array, "B parts T N"]) -> Part:
    """Parts that stand one behind the other as one."""
    maximum = or_zero(jnp.max(lse, axis=1))
    weight = jnp.exp(lse - maximum[:, None])
    total = jnp.sum(weight, axis=1)
    mixed = jnp.sum(output.astype(jnp.float32) * weight[..., None], axis=1)
    return divided(mixed, total, maximum)


def or_zero(maximum: Float32[Array, "B T N"]) -> Float32[Array, "B T N"]:
    """Something finite to subtract where no part has read anything: -inf less -inf is NaN."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def divided(mixed: Float32[Array, "B T N I"], total: Float32[Array, "B T N"], maximum: Float32[Array, "B T N"]) -> Part:
    read_nothing = total == 0
    output = mixed / jnp.where(read_nothing, 1.0, total)[..., None]
    return Part(output, maximum + jnp.log(total))
