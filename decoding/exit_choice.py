"""Which early exit pays best: from how often each exit's token is right to the exit layer and the draft length.

DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598 ("tokens per layer").
Departs from the paper in what a round costs. There a draft of A tokens through l of L layers costs A l + L; here the
drafted tokens' states after l layers are handed over to the verification, which runs the other layers only, so that a
round costs (A + 1) l + (L - l), in forwards of one layer: the pending token and every drafted one run the first l
layers, and one forward over all of them runs the rest.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def tokens_per_layer(
    agreement: Float[Array | np.ndarray, " exits"], num_layers: int, max_tokens: int
) -> Float32[Array, "exits lengths"]:
    """Expected new tokens per layer-forward of a round, for drafts of 0 .. `max_tokens` tokens from each exit.

    agreement[l - 1]: the chance that the token found after l layers is the model's own, independently for each.

    >>> tokens_per_layer(np.array([0.5]), 4, 2).round(4).tolist()  # 1 / 4, 1.5 / (2 + 3), 1.75 / (3 + 3)
    [[0.25, 0.30000001192092896, 0.29170000553131104]]
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

    Where no draft pays, its length is `min_tokens`.

    >>> layer, tokens = best_exit(np.array([0.2, 0.9, 0.95]), 4, 6)
    >>> int(layer), int(tokens)
    (2, 4)
    """
    worth = tokens_per_layer(agreement, num_layers, max_tokens)[:, min_tokens:]
    place = jnp.argmax(worth.reshape(-1)).astype(jnp.int32)
    return place // worth.shape[1] + 1, place % worth.shape[1] + min_tokens
