"""Computes the parts of rejection sampling: acceptance probability and residual distribution.

For a draft token drawn from q and a target distribution p, accepting it with probability min(1, p/q) and otherwise
drawing from norm(max(p - q, 0)) gives exactly p: each token has probability min(p, q) + max(p - q, 0). A token that was
chosen, not drawn, counts as drawn from the distribution with all probability on it.

All distributions here are probabilities, not logarithms. Rounding may make a residual distribution all zeros (where p
and q differ only in their last bits); the distribution before it is then kept, so no token with target probability 0 is
ever drawn.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def acceptance_probability(
    target_probs: Float[Array, "*any"], draft_probs: Float[Array, "*any"]
) -> Float[Array, "*any"]:
    """min(1, p / q), the probability of accepting a draft token; 0 where p is 0.

    >>> [float(acceptance_probability(jnp.float32(p), jnp.float32(q))) for p, q in ((0.25, 0.5), (0.5, 0.25))]
    [0.5, 1.0]
    """
    return jnp.where(target_probs > 0, jnp.minimum(target_probs / draft_probs, 1), 0)


def residual_distribution(
    target_probs: Float[Array, "*any V"], draft_probs: Float[Array, "*any V"]
) -> Float[Array, "*any V"]:
    """norm(max(p - q, 0)), the distribution to draw from after a token drawn from q was rejected.

    >>> residual_distribution(jnp.array([0.5, 0.25, 0.25]), jnp.array([0.0, 0.75, 0.25])).tolist()
    [1.0, 0.0, 0.0]
    """
    return _normalised(jnp.maximum(target_probs - draft_probs, 0), target_probs)


def distribution_without(target_probs: Float[Array, "*any V"], token: Int[Array, "*any"]) -> Float[Array, "*any V"]:
    """The distribution without a rejected token, renormalised.

    >>> distribution_without(jnp.array([0.5, 0.25, 0.25]), jnp.int32(0)).tolist()
    [0.0, 0.5, 0.5]
    """
    return _normalised(jnp.where(is_token(token, target_probs.shape[-1]), 0, target_probs), target_probs)


def is_token(token: Int[Array, "*any"], vocab_size: int) -> Array:
    """Bool[*any, V], true at the token."""
    return jax.nn.one_hot(token, vocab_size, dtype=bool)


def _normalised(weight: Float[Array, "*any V"], otherwise: Float[Array, "*any V"]) -> Float[Array, "*any V"]:
    """The weights divided by their sum; `otherwise` where all are 0."""
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), otherwise)
