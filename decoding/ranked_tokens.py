"""Fills a draft tree from top-k tokens for each distance: every node at depth d takes one of those for distance d.

The top-k tokens at a distance do not depend on the token chosen before it, so the tree is a subset of their Cartesian
product, and ranks identify a node. Medusa, arXiv 2401.10774; Parallel Prompt Decoding, arXiv 2405.18628.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.top_tokens import top_k_tokens


def sibling_ranks(parents: Sequence[int]) -> Int[np.ndarray, " C"]:
    """The rank of each node among its siblings, from 0; the root's is 0.

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
    ranked: Int[Array, "B A R"],
    last_token: Int[Array, " B"],
    depth: Int[Array | np.ndarray, "#B C"],
    rank: Int[Array | np.ndarray, "#B C"],
) -> Int[Array, "B C"]:
    """The token of every node of a tree.

    ranked: the top-k tokens for each distance from 1.
    last_token: the token of the root.
    depth, rank: of each node; it takes token `rank` for distance `depth`.
    """
    level = jnp.broadcast_to(jnp.maximum(jnp.asarray(depth) - 1, 0), (ranked.shape[0], depth.shape[1]))
    place = level * ranked.shape[2] + jnp.asarray(rank)
    token = jnp.take_along_axis(ranked.reshape(ranked.shape[0], -1), place, axis=1)
    return jnp.where(jnp.asarray(depth) > 0, token, last_token[:, None])


def top_k_per_distance(logits: Float[Array, "B A V"], count: int) -> tuple[Int[Array, "B A R"], Bool[Array, "B A R"]]:
    """The `count` most probable tokens for each distance, most probable first, and which of them are possible."""
    batch, distances, vocab_size = logits.shape
    token, possible = top_k_tokens(logits.reshape(-1, vocab_size), count)
    return token.reshape(batch, distances, count), possible.reshape(batch, distances, count)


def rank_accuracies(
    logits: Float[Array, "*N V"], target: Int[Array, "*N"], counted: Bool[Array, "*N"], num_ranks: int
) -> Float[Array, " R"]:
    """How often (summed over the counted positions) the target token is the r-th most probable; of equals the first."""
    score = jnp.take_along_axis(logits, target[..., None], axis=-1)
    is_before = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < target[..., None]
    rank = jnp.sum((logits > score) | ((logits == score) & is_before), axis=-1)
    places = jnp.expand_dims(jnp.arange(num_ranks), tuple(range(rank.ndim)))
    is_rank = (rank[..., None] == places) & counted[..., None]
    return jnp.sum(is_rank.reshape(-1, num_ranks).astype(jnp.float32), axis=0)
