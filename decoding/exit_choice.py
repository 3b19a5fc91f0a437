"""Chooses the early-exit layer and the draft length with the most expected tokens per layer, from agreement rates.

DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598 ("tokens per layer").
Departs from the paper in the cost of a round. There a draft of A tokens through l of L layers costs A l + L. Here
verification takes over the draft tokens' hidden states after l layers and runs only the other layers, so that a round
costs (A + 1) l + (L - l), in forwards of one layer: the last token and every draft token run the first l layers, and
one forward over all of them runs the rest.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def tokens_per_layer(
    agreement: Float[Array | np.ndarray, " exits"], num_layers: int, max_tokens: int
) -> Float32[Array, "exits lengths"]:
    """Expected new tokens per layer-forward of a round, for drafts of 0 .. `max_tokens` tokens from each exit.

    agreement[l - 1]: probability that the token predicted after l layers is the model's own, independently for each.

    >>> [round(float(x), 3) for x in tokens_per_layer(np.array([0.5]), 4, 2)[0]]  # 1 / 4, 1.5 / (1 + 4), 1.75 / (2 + 4)
    [0.25, 0.3, 0.292]
    """
    length = jnp.arange(max_tokens + 1, dtype=jnp.int32)[None, :]
    layers = jnp.arange(1, agreement.shape[0] + 1, dtype=jnp.int32)[:, None]
    reached = jnp.asarray(agreement, jnp.float32)[:, None] ** length.astype(jnp.float32)  # 0 ** 0 is 1
    cost = length * layers + num_layers
    return jnp.cumsum(reached, axis=1) / cost.astype(jnp.float32)


def best_exit(
    agreement: Float[Array | np.ndarray, " exits"], num_layers: int, max_tokens: int, min_tokens: int = 0
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The exit layer (from 1) and the draft length with the most tokens per layer; of equals the first, the shortest.

    agreement, num_layers, max_tokens: as in `tokens_per_layer`.
    min_tokens: the shortest draft; the length where no draft pays.

    >>> layer, tokens = best_exit(np.array([0.2, 0.9, 0.95]), 4, 6)
    >>> int(layer), int(tokens)
    (2, 3)
    """
    worth = tokens_per_layer(agreement, num_layers, max_tokens)[:, min_tokens:]
    place = jnp.argmax(worth.reshape(-1)).astype(jnp.int32)
    return place // worth.shape[1] + 1, place % worth.shape[1] + min_tokens
