"""From guesses for each distance to the tokens of a tree: every node at depth d takes one of the d-th guesses.

The guesses at a distance do not depend on which token was chosen before it, so the tree is a part of their Cartesian
product: a node is told by its ranks. Medusa, arXiv 2401.10774; Parallel Prompt Decoding, arXiv 2405.18628.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.drafters._expand import largest_tokens


def sibling_ranks(parents: Sequence[int]) -> Int[np.ndarray, " C"]:
    """The place of each node among its siblings, from 0; the root's is 0.

    >>> sibling_ranks((-1, 0, 0, 1)).tolist()
    [0, 0, 1, 0]
    """
    seen: dict[int, int] = {}
    ranks = []
    for parent in parents:
        ranks.append(seen.get(parent, 0))
        seen[parent] = ranks[-1] + 1
    return np.asarray(ranks, np.int32)


def tree_tokens(
    guesses: Int[Array, "B A R"],
    pending: Int[Array, " B"],
    depth: Int[Array | np.ndarray, "#B C"],
    rank: Int[Array | np.ndarray, "#B C"],
) -> Int[Array, "B C"]:
    """The token of every node: guess number `rank` for distance `depth` (from 1), the pending token at the root."""
    level = jnp.broadcast_to(jnp.maximum(jnp.asarray(depth) - 1, 0), (guesses.shape[0], depth.shape[1]))
    place = level * guesses.shape[2] + jnp.asarray(rank)
    token = jnp.take_along_axis(guesses.reshape(guesses.shape[0], -1), place, axis=1)
    return jnp.where(jnp.asarray(depth) > 0, token, pending[:, None])


def best_guesses(logits: Float[Array, "B A V"], count: int) -> tuple[Int[Array, "B A R"], Bool[Array, "B A R"]]:
    """The `count` likeliest tokens for each distance, likeliest first, and which of them are possible."""
    batch, distances, vocab_size = logits.shape
    token, possible = largest_tokens(logits.reshape(-1, vocab_size), count)
    return token.reshape(batch, distances, count), possible.reshape(batch, distances, count)


def rank_accuracies(
    logits: Float[Array, "*N V"], wanted: Int[Array, "*N"], counted: Bool[Array, "*N"], num_ranks: int
) -> Float[Array, " R"]:
    """How often (summed over the places counted) the wanted token is the r-th likeliest; of equals the first counts."""
    score = jnp.take_along_axis(logits, wanted[..., None], axis=-1)
    is_before = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < wanted[..., None]
    rank = jnp.sum((logits > score) | ((logits == score) & is_before), axis=-1)
    places = jnp.expand_dims(jnp.arange(num_ranks), tuple(range(rank.ndim)))
    is_rank = (rank[..., None] == places) & counted[..., None]
    return jnp.sum(is_rank.reshape(-1, num_ranks).astype(jnp.float32), axis=0)
