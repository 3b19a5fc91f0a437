"""Finds where to cut a distribution, without sorting the vocabulary.

Top-k, top-p and typical sampling each keep the best-scored tokens until they hold enough: k tokens, or probability p.
That is a threshold on the score, found here by bisection. Floating-point numbers in order are integers in order, so 32
halvings find it exactly. Each halving is one pass over the row; measured on a CPU core at V = 32,000 the 32 of them
take 0.2 ms and a sort 5.8 ms. A k that changes from row to row and call to call costs nothing, where `lax.top_k` needs
it at compile time.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32


def _float_of(rank: Int32[Array, "B"]) -> Float32[Array, "B"]:
    """The float at this place in the order of all floats (0 is 0.0, 1 the smallest above, -1 is -0.0)."""
    return lax.bitcast_convert_type(jnp.where(rank < 0, rank ^ 0x7FFFFFFF, rank), jnp.float32)


_RANK_OF_MINUS_INFINITY = -0x7F800001
_RANK_OF_SMALLEST_NORMAL = 0x00800000
_RANK_OF_INFINITY = 0x7F800000


def cut_threshold(
    score: Float32[Array, "B V"], weight: Float32[Array, "B V"], target: Float32[Array, "B"]
) -> Float32[Array, "B"]:
    """The largest threshold such that the tokens with score >= threshold together weigh at least the target.

    Scores are below +inf, weights are not negative, targets are positive. Tokens of equal score are kept or cut
    together. -inf, which keeps everything, where the whole row weighs less than the target.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        enough, too_little = bounds
        middle = (enough >> 1) + (too_little >> 1) + (enough & too_little & 1)  # the mean, without overflow
        total = jnp.sum(jnp.where(score >= _float_of(middle)[:, None], weight, 0.0), axis=-1)
        is_enough = total >= target
        return jnp.where(is_enough, middle, enough), jnp.where(is_enough, too_little, middle)

    # Zeros made from the target keep a mapped axis (vmap, shard_map) in the loop's carry from the start.
    zero = jnp.zeros_like(target, dtype=jnp.int32)
    enough, _ = lax.fori_loop(0, 32, halve, (zero + _RANK_OF_MINUS_INFINITY, zero + _RANK_OF_INFINITY))
    # A processor that takes subnormal numbers for 0 finds the largest of them where the threshold is 0.
    is_subnormal = (enough > 0) & (enough < _RANK_OF_SMALLEST_NORMAL)
    return _float_of(jnp.where(is_subnormal, 0, enough))
