"""Gathers the W - 1 tokens directly before each token, for layers with short causal convolutions.

In a chain these are the neighbours to the left. In a token tree they are the node's ancestors, some of which may be
staged (`layers/kv_cache/staged.py`), and before the root come the tokens committed last. Of those a cache keeps a tail:
their columns (the numbers per token that the layer convolves), oldest first, with zeros before a row's first token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.attention.mask import Mask, Tokens


def predecessors(
    columns: Float[Array, "B T I"],
    position: Int[Array, "B T"],
    mask: Mask,
    tail: Float[Array, "B W_minus_1 I"],
    staged: tuple[Float[Array, "B U I"], Int[Array, "B U"]] | None,
) -> Float[Array, "B T W I"]:
    """The columns of each new token, last, and of the W - 1 tokens before it, oldest first.

    columns: of the new tokens.
    position: of the new tokens.
    mask: of the new and the staged tokens, those that a token attends to are its ancestors. It must attend to its W - 1
        predecessors: a window narrower than W must not be in the mask.
    tail: columns of the W - 1 tokens committed last.
    staged: columns and positions of the tokens staged before the new ones.

    Columns are copied and never multiplied, so a non-finite token reaches only those after it.
    """
    num_tokens, width = columns.shape[1], tail.shape[1] + 1
    if staged is None and mask.span(is_new=True) is not None:
        row = jnp.concatenate([tail.astype(columns.dtype), columns], axis=1)
        return jnp.stack([row[:, start : start + num_tokens] for start in range(width)], axis=2)
    waiting, key_position = columns, position
    if staged is not None:
        waiting = jnp.concatenate([staged[0].astype(columns.dtype), columns], axis=1)
        key_position = jnp.concatenate([staged[1], position], axis=1)
    row = jnp.concatenate([tail.astype(columns.dtype), waiting], axis=1)

    allowed = mask.allows(Tokens(position, is_new=True), Tokens(key_position, is_new=True))
    distances = position[:, :, None] - key_position[:, None, :]  # in positions, from each token back to the others
    num_ancestors = jnp.sum(allowed & (distances > 0), axis=2, dtype=jnp.int32)
    places = []
    for distance in range(width - 1, 0, -1):
        among_waiting = width - 1 + jnp.argmax(allowed & (distances == distance), axis=2)
        # Before the first ancestor come the committed tokens, from the last of them back.
        in_tail = width - 1 + num_ancestors - distance
        places.append(jnp.where(num_ancestors >= distance, among_waiting, in_tail))
    own = width - 1 + waiting.shape[1] - num_tokens + jnp.arange(num_tokens)
    places.append(jnp.broadcast_to(own[None, :], position.shape))
    place = jnp.stack(places, axis=2).reshape(position.shape[0], -1)
    gathered = jnp.take_along_axis(row, place[:, :, None], axis=1)
    return gathered.reshape(*columns.shape[:2], width, -1)


def tail_after(
    tail: Float[Array, "B W_minus_1 I"],
    columns: Float[Array, "B T I"],
    count: Int[Array, " B"],
    path: Int[Array, "B A"] | None = None,
) -> Float[Array, "B W_minus_1 I"]:
    """The tail once `count[b]` of the new tokens are committed.

    tail: before that.
    columns: of the new tokens.
    count: how many are committed in each row.
    path: which ones; None: the first.
    """
    accepted = columns if path is None else jnp.take_along_axis(columns, path[:, :, None], axis=1)
    row = jnp.concatenate([tail, accepted.astype(tail.dtype)], axis=1)
    place = count[:, None] + jnp.arange(tail.shape[1], dtype=count.dtype)[None, :]
    return jnp.take_along_axis(row, place[:, :, None], axis=1)
