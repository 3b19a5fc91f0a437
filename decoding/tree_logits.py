"""Applies the sampling options at every node of a draft tree, as if the path to it had been emitted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling, processed_logits
from decodax.decoding.tree import Tree


def node_history(history: History, tree: Tree, token: Int[Array, "B C"]) -> History:
    """The history at every node, as if the tokens from the root to it had been emitted: arrays [B, C, ...]."""
    depth = jnp.broadcast_to(jnp.asarray(tree.depth), token.shape)
    num_new_tokens = history.num_new_tokens[:, None] + depth
    prompt, output = history.prompt_counts, history.output_counts
    if prompt is None or output is None:
        return History(None, None, num_new_tokens)
    batch, num_nodes = token.shape
    drafted = jnp.asarray(tree.ancestors) & (jnp.asarray(tree.depth) > 0)[:, None, :]  # the root is recorded already
    drafted = jnp.broadcast_to(drafted, (batch, num_nodes, num_nodes)).astype(jnp.int32)
    row, node = jnp.arange(batch)[:, None, None], jnp.arange(num_nodes)[None, :, None]
    output = jnp.broadcast_to(output[:, None], (batch, num_nodes, output.shape[1]))
    output = output.at[row, node, token[:, None, :]].add(drafted, mode="drop")
    return History(jnp.broadcast_to(prompt[:, None], output.shape), output, num_new_tokens)


def node_logits(sampling: Sampling, logits: Float32[Array, "B C V"], history: History) -> Float32[Array, "B C V"]:
    """The logits after every active processor, at every node."""

    def at_node(logits: Array, history: History) -> Array:
        return processed_logits(sampling, logits, history)

    return jax.vmap(at_node, in_axes=1, out_axes=1)(logits, history)
