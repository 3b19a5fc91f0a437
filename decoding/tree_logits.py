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
    prompt, output, tokens, length = history.prompt_counts, history.output_counts, history.tokens, history.length
    batch, num_nodes = token.shape
    is_drafted = jnp.asarray(tree.ancestors) & (jnp.asarray(tree.depth) > 0)[:, None, :]  # the root is recorded already
    is_drafted = jnp.broadcast_to(is_drafted, (batch, num_nodes, num_nodes))
    row, node, token = jnp.arange(batch)[:, None, None], jnp.arange(num_nodes)[None, :, None], token[:, None, :]

    def at_nodes(array: Array) -> Array:
        return jnp.broadcast_to(array[:, None], (batch, num_nodes, array.shape[1]))

    if prompt is not None and output is not None:
        prompt = at_nodes(prompt)
        output = at_nodes(output).at[row, node, token].add(is_drafted.astype(jnp.int32), mode="drop")
    if tokens is not None and length is not None:
        slot = jnp.where(is_drafted, length[:, None, None] + depth[:, None, :] - 1, tokens.shape[1])
        tokens, length = at_nodes(tokens).at[row, node, slot].set(token, mode="drop"), length[:, None] + depth
    return History(prompt, output, history.num_new_tokens[:, None] + depth, tokens, length)


def node_logits(sampling: Sampling, logits: Float32[Array, "B C V"], history: History) -> Float32[Array, "B C V"]:
    """The logits after every active processor, at every node."""

    def at_node(logits: Array, history: History) -> Array:
        return processed_logits(sampling, logits, history)

    return jax.vmap(at_node, in_axes=1, out_axes=1)(logits, history)
