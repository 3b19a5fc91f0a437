"""From a draft's logits at a node to the node's children."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Children
from decodax.decoding.logits_processors._largest import largest_token
from decodax.decoding.random import Draw, draw_keys, gumbel


def draw_children(
    logits: Float32[Array, "B W V"],
    kind: Children,
    num_children: int,
    seed: UInt32[Array, " B"],
    position: Int[Array, "B W"],
) -> tuple[Int[Array, "B W I"], Bool[Array, "B W I"]]:
    """`num_children` tokens for each of W nodes, in the order in which they are drawn, and which of them can come.

    position: where the children will stand; it makes their random numbers. Children drawn without replacement are the
    largest logits after one common Gumbel noise (Gumbel-top-k, arXiv 1903.06059), which is drawing one after the other.
    """

    def of_node(logits: Float32[Array, "B V"], position: Int[Array, " B"]) -> tuple[Array, Array]:
        if kind is Children.INDEPENDENT:
            noise = gumbel(draw_keys(seed, position, Draw.DRAFT), (num_children, logits.shape[1]))
            scores = logits[:, None, :] + noise
            token = jax.vmap(largest_token, in_axes=1, out_axes=1)(scores)
            return token, jnp.max(scores, axis=2) > -jnp.inf  # false for NaN
        if kind is Children.WITHOUT_REPLACEMENT:
            logits = logits + gumbel(draw_keys(seed, position, Draw.DRAFT), (logits.shape[1],))
        return largest_tokens(logits, num_children)

    return jax.vmap(of_node, in_axes=1, out_axes=1)(logits, position)


def largest_tokens(logits: Float32[Array, "B V"], count: int) -> tuple[Int[Array, "B I"], Bool[Array, "B I"]]:
    """The `count` tokens of the largest logits, largest first, and which of them are possible (above -inf).

    By repeated maxima, as a sort of a whole vocabulary costs more on CPU than a few passes.
    """
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    tokens, possible = [], []
    for _ in range(count):
        token = largest_token(logits)
        tokens.append(token)
        possible.append(jnp.max(logits, axis=1) > -jnp.inf)
        logits = jnp.where(ids == token[:, None], -jnp.inf, logits)
    return jnp.stack(tokens, axis=1), jnp.stack(possible, axis=1)
