"""Draws the children of draft tree nodes from the draft's logits there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, UInt32

from decodax.decoding.drafters._staged_draft import StagedDraft
from decodax.decoding.drafters.contract import Children
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.state import DecodeState
from decodax.decoding.top_tokens import argmax_token, top_k_tokens


def with_drawn_children(
    draft: StagedDraft,
    state: DecodeState,
    kind: Children,
    logits: Float32[Array, "B W V"],
    node: Int[Array, " W"],
    children: Int[Array, "W I"],
    position: Int[Array, "B W"],
) -> StagedDraft:
    """The draft with the children of W nodes, and with the log-probabilities from which they were drawn.

    kind: how the children are found.
    logits: the draft's, at each node, after the sampling options.
    children: their nodes; one beyond the draft is dropped.
    position: of the children.
    """
    token, is_possible = draw_children(logits, kind, children.shape[1], state.seed, position)
    batch, logprobs = token.shape[0], draft.logprobs
    if logprobs is not None:
        logprobs = logprobs.at[:, node].set(jax.nn.log_softmax(logits, axis=2), mode="drop")
    draft = draft.with_children(children.reshape(-1), token.reshape(batch, -1), is_possible.reshape(batch, -1))
    return replace(draft, logprobs=logprobs)


def empty_logprobs(
    state: DecodeState, kind: Children, num_nodes: int, vocab_size: int
) -> Float32[Array, "B C V"] | None:
    """Where a draft keeps the log-probabilities from which children are drawn; None where none are drawn."""
    if not state.sampling.do_sample or kind is Children.CHOSEN:
        return None
    return jnp.zeros((state.tokens.shape[0], num_nodes, vocab_size), jnp.float32)


def draw_children(
    logits: Float32[Array, "B W V"],
    kind: Children,
    num_children: int,
    seed: UInt32[Array, " B"],
    position: Int[Array, "B W"],
) -> tuple[Int[Array, "B W I"], Bool[Array, "B W I"]]:
    """`num_children` tokens for each of W nodes, in the order in which they are drawn, and which of them are possible.

    Children drawn without replacement are the largest logits after one common Gumbel noise (Gumbel-top-k, arXiv
    1903.06059), which is the same as drawing one after the other.

    logits: the draft's, at each node.
    kind: how the children are found.
    seed: one per row.
    position: of the children; it makes their random numbers.
    """
    batch, width, vocab_size = logits.shape
    # All nodes are along one axis: random bits over two nested axes take XLA several times as long to compile.
    flat = logits.reshape(batch * width, vocab_size)

    def noise(*shape: int) -> Float32[Array, "..."]:
        keys = draw_keys(jnp.repeat(seed, width), position.reshape(-1), Draw.DRAFT)
        return gumbel(keys, (*shape, vocab_size))

    if kind is Children.INDEPENDENT:
        scores = flat[:, None, :] + noise(num_children)
        token = jax.vmap(argmax_token, in_axes=1, out_axes=1)(scores)
        is_possible = jnp.max(scores, axis=2) > -jnp.inf  # false for NaN
    else:
        if kind is Children.WITHOUT_REPLACEMENT:
            flat = flat + noise()
        token, is_possible = top_k_tokens(flat, num_children)
    return token.reshape(batch, width, num_children), is_possible.reshape(batch, width, num_children)
