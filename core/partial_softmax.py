"""Computes a softmax over keys that come block by block, and merges the partial softmaxes of different keys.

`OnlineSoftmax` goes over blocks of scores and values: for each query it keeps the maximum score m, the sum of weights
exp(score - m) and the weighted values; a new block rescales what came before by exp(m_old - m_new). It is the online
softmax of FlashAttention-2, arXiv 2307.08691, and the only one in plain JAX; kernels have theirs in
`kernels_pallas/online_softmax.py`.

A partial softmax is the attention output over its keys and the log-sum-exp of their scores; where a query attends to
none of them, the log-sum-exp is -inf. With lse = log sum_i exp(lse_i), the merged output is
sum_i exp(lse_i - lse) output_i, over devices or over time. Merged results are float32, as sums are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

MeshAxes = str | tuple[str, ...]

MASKED = -1e30  # the score of a masked key: finite, so that no difference of two scores is NaN
_EMPTY = MASKED / 2  # a maximum below this: every key was masked


class OnlineSoftmax(NamedTuple):
    """Attention of Q queries of each key-value head to the blocks of keys so far.

    maximum: the largest score, MASKED where every key was masked.
    total: the sum of the weights exp(score - maximum).
    output: the sum of the weighted values.

    A block whose keys are all masked leaves weights of 1 in a query that has seen nothing else. The first key that is
    not masked wipes them out (exp(MASKED - score) = 0), and `finish` tells a query that has none by its maximum.
    """

    maximum: Float32[Array, "*batch K Q"]
    total: Float32[Array, "*batch K Q"]
    output: Float32[Array, "*batch K Q I"]

    @classmethod
    def start(
        cls, shape: tuple[int, ...], value_size: int, sink_logits: Float[Array, "#B K Q"] | None = None
    ) -> "OnlineSoftmax":
        """The softmax over no keys.

        shape: [..., K, Q].
        sink_logits: scores of learned sinks, keys without a value (gpt-oss, arXiv 2508.10925).
        """
        nothing = jnp.zeros(shape, jnp.float32)
        maximum, total = nothing + MASKED, nothing
        if sink_logits is not None:
            maximum = jnp.broadcast_to(jnp.maximum(sink_logits.astype(jnp.float32), MASKED), shape)
            total = nothing + 1
        return cls(maximum, total, jnp.zeros((*shape, value_size), jnp.float32))

    def absorb(
        self,
        score: Float32[Array, "B K Q S"],
        allowed: Bool[Array, "#B #K #Q S"],
        value: Float[Array, "B K S I"],
        *,
        reproducible: bool = False,
    ) -> "OnlineSoftmax":
        """The softmax over the keys so far and those of one more block.

        score: scaled products of queries and keys.
        allowed: which keys each query attends to.
        value: of the keys; one that is not finite makes every query of its head NaN, as 0 x NaN is NaN.
        reproducible: a query gets the same bits from the same keys in every program, whatever blocks of masked keys
            come before and between. Barriers keep XLA from merging a product and a sum into one rounding in one program
            and not in another, and masked weights are exactly 0.
        """
        fence = jax.lax.optimization_barrier if reproducible else _same
        score = fence(jnp.where(allowed, score, MASKED))
        maximum = jnp.maximum(self.maximum, jnp.max(score, axis=-1))
        weight = jnp.exp(score - maximum[..., None])
        if reproducible:
            weight = jnp.where(allowed, weight, 0.0)
        weight, decay = fence((weight, jnp.exp(self.maximum - maximum)))
        mixed = jnp.einsum("bkqs,bksi->bkqi", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
        total = self.total * decay + jnp.sum(weight, axis=-1)
        return fence(OnlineSoftmax(maximum, total, self.output * decay[..., None] + mixed))

    def finish(self, dtype: DTypeLike) -> tuple[Float[Array, "*batch K Q I"], Float32[Array, "*batch K Q"]]:
        """The output in `dtype`, and the log-sum-exp of the scores; 0 and -inf for a query that attends to no key."""
        is_empty = self.maximum < _EMPTY
        total = jnp.where(is_empty, 1.0, self.total)
        output = jnp.where(is_empty[..., None], 0.0, self.output / total[..., None]).astype(dtype)
        return output, jnp.where(is_empty, -jnp.inf, self.maximum + jnp.log(total))


def _same(tree: Any) -> Any:
    return tree


class PartialSoftmax(NamedTuple):
    """Attention over some of the keys.

    output: attention output, normalised over these keys alone.
    lse: log-sum-exp of the scores, -inf where a query attends to none of these keys.
    """

    output: Float[Array, "B T N I"]
    lse: Float32[Array, "B T N"]


def in_float32(partial: PartialSoftmax) -> PartialSoftmax:
    """The partial softmax with its output in float32, as it is merged."""
    return PartialSoftmax(partial.output.astype(jnp.float32), partial.lse)


def merge(one: PartialSoftmax, other: PartialSoftmax) -> PartialSoftmax:
    """Merges two partial softmaxes. A log-sum-exp of NaN in either makes the result NaN."""
    is_empty = (other.lse == -jnp.inf) & ~jnp.isnan(one.lse)
    share = jnp.where(is_empty, 1.0, jax.nn.sigmoid(one.lse - other.lse))[..., None]
    output = one.output.astype(jnp.float32) * share + other.output.astype(jnp.float32) * (1 - share)
    return PartialSoftmax(output, jnp.logaddexp(one.lse, other.lse))


def merge_stack(output: Float[Array, "B partials T N I"], lse: Float32[Array, "B partials T N"]) -> PartialSoftmax:
    """Merges the partial softmaxes of a stack (axis 1)."""
    maximum = or_zero(jnp.max(lse, axis=1))
    weight = jnp.exp(lse - maximum[:, None])
    total = jnp.sum(weight, axis=1)
    mixed = jnp.sum(output.astype(jnp.float32) * weight[..., None], axis=1)
    return divided(mixed, total, maximum)


def or_zero(maximum: Float32[Array, "B T N"]) -> Float32[Array, "B T N"]:
    """The maximum, or 0 where every log-sum-exp is -inf: -inf minus -inf is NaN."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def divided(
    mixed: Float32[Array, "B T N I"], total: Float32[Array, "B T N"], maximum: Float32[Array, "B T N"]
) -> PartialSoftmax:
    """The merged softmax, from sums weighted by exp(lse - maximum)."""
    output = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    return PartialSoftmax(output, maximum + jnp.log(total))
