"""What rejection rules are made of: how likely a draft token is taken, and from which law to draw once it is refused.

With a token drawn from q and wanted from p, taking it with probability min(1, p/q) and else drawing from what p has
more than q, renormalised, gives exactly p: a token comes with min(p, q) + max(p - q, 0). A token that was not drawn but
chosen is one from the law that has all its probability on it.

All laws here are probabilities, not logarithms. Rounding may leave a law with nothing (where p and q are the same but
for their last bits); the law before is then kept, so no token ever comes that the target finds impossible.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Proposal
from decodax.decoding.logits_processors._largest import largest_token
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.verifiers._contract import Verdict, at_node, node_keys


def ratio(wanted: Float[Array, "*any"], drafted: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """min(1, wanted / drafted), the probability of taking a token; 0 where it is not wanted at all.

    >>> float(ratio(jnp.float32(0.25), jnp.float32(0.5))), float(ratio(jnp.float32(0.5), jnp.float32(0.25)))
    (0.5, 1.0)
    """
    return jnp.where(wanted > 0, jnp.minimum(wanted / drafted, 1), 0)


def excess(wanted: Float[Array, "*any V"], drafted: Float[Array, "*any V"]) -> Float[Array, "*any V"]:
    """norm(max(wanted - drafted, 0)), the law to draw from after a token drawn from `drafted` has been refused.

    >>> excess(jnp.array([0.5, 0.25, 0.25]), jnp.array([0.0, 0.75, 0.25])).tolist()
    [1.0, 0.0, 0.0]
    """
    return _normalised(jnp.maximum(wanted - drafted, 0), wanted)


def without(wanted: Float[Array, "*any V"], token: Int[Array, "*any"]) -> Float[Array, "*any V"]:
    """The law after a token has been ruled out.

    >>> without(jnp.array([0.5, 0.25, 0.25]), jnp.int32(0)).tolist()
    [0.0, 0.5, 0.5]
    """
    return _normalised(jnp.where(is_token(token, wanted.shape[-1]), 0, wanted), wanted)


def is_token(token: Int[Array, "*any"], vocab_size: int) -> Array:
    """Bool[*any, V], true at the token."""
    return jax.nn.one_hot(token, vocab_size, dtype=bool)


def _normalised(weight: Float[Array, "*any V"], otherwise: Float[Array, "*any V"]) -> Float[Array, "*any V"]:
    """The law in proportion to the weights; `otherwise` where all are 0."""
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), otherwise)


def acceptance_draws(
    proposal: Proposal, seed: UInt32[Array, " B"], position: Int[Array, "B C"]
) -> Float32[Array, "B C"]:
    """A uniform number in [0, 1) for every node, by which it is accepted; those of siblings are independent.

    position: as for `Verifier.verify`; a node itself stands where the token that follows its parent does.
    """
    parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(proposal.tree.parent), 0), position.shape)
    keys = node_keys(seed, jnp.take_along_axis(position, parent, axis=1), Draw.ACCEPT).reshape(-1)
    node = jnp.tile(jnp.arange(position.shape[1], dtype=jnp.uint32), position.shape[0])

    def random_bits(key: Array, node: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, node), (), jnp.uint32)

    # 24 bits, as many as float32 holds below 1: a token of probability 1 is always taken, one of probability 0 never.
    uniform = (jax.vmap(random_bits)(keys, node) >> 8).astype(jnp.float32) * 2.0**-24
    return uniform.reshape(position.shape)


def draw_after(
    node: Int[Array, " B"], law: Float32[Array, "B V"], seed: UInt32[Array, " B"], position: Int[Array, "B C"]
) -> Verdict:
    """Ends at `node` with a token drawn from `law`, with the random numbers plain decoding has at this position."""
    noise = gumbel(draw_keys(seed, at_node(position, node), Draw.TOKEN), law.shape[1:])
    return Verdict(node, largest_token(jnp.log(law) + noise))
