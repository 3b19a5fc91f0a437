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

    batch, width, vocab_size = logits.shape
    # All nodes along one axis: random bits over two nested ones take XLA several times as long to compile.
    flat = logits.reshape(batch * width, vocab_size)

    def noise(*shape: int) -> Float32[Array, "..."]:
        keys = draw_keys(jnp.repeat(seed, width), position.reshape(-1), Draw.DRAFT)
        return gumbel(keys, (*shape, vocab_size))

    if kind is Children.INDEPENDENT:
        scores = flat[:, None, :] + noise(num_children)
        token = jax.vmap(largest_token, in_axes=1, out_axes=1)(scores)
        is_possible = jnp.max(scores, axis=2) > -jnp.inf  # false for NaN
    else:
        if kind is Children.WITHOUT_REPLACEMENT:
            flat = flat + noise()
        token, is_possible = largest_tokens(flat, num_children)
    return token.reshape(batch, width, num_children), is_possible.reshape(batch, width, num_children)


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
