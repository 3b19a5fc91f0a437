"""Gives drafters made of the target's first layers their checks, attention mask and exit predictions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling, processed_logits
from decodax.decoding.top_tokens import argmax_token
from decodax.layers.attention.mask import Ancestors
from decodax.models.model import Model


def check_exit(model: Model, exit_layer: int) -> None:
    """Raises ValueError for an exit that is not between the first layer and the last."""
    last = model.config.num_layers - 1
    if last < 1:
        raise ValueError("an early exit needs a model of at least 2 layers, got 1")
    if not 1 <= exit_layer <= last:
        raise ValueError(f"exit_layer must be in 1..{last} (layers that draft, of {last + 1}), got {exit_layer}")


def check_draft(own: Model, target: Model, draft_params: Any) -> None:
    """Raises ValueError when the model whose layers draft is not the one that verifies, or has other weights."""
    if own != target:
        raise ValueError(
            "the layers that draft must be the target's own: make the drafter with the model it drafts for"
        )
    if draft_params is not None:
        raise ValueError("early layers draft with the target's own weights: leave draft_params out (None)")


def staged_before(node: Int[Array, ""], num_nodes: int) -> Ancestors:
    """The attention mask of one node of a chain, whose earlier nodes are staged."""
    allowed = jnp.concatenate([jnp.arange(num_nodes, dtype=jnp.int32) < node, jnp.ones(1, bool)])
    return Ancestors(allowed[None, None])


def argmax_and_confidence(
    sampling: Sampling, logits: Float32[Array, "B V"], history: History
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """The most probable token after the sampling options that can change it, and the confidence: its probability.

    The confidence is that without options, so that it means the same in greedy rows and in sampled ones.
    """
    confidence = jnp.exp(jnp.max(logits, axis=1) - jax.nn.logsumexp(logits, axis=1))
    movers = tuple(processor for processor in sampling.processors if not processor.only_sampling)
    sampling = dataclasses.replace(sampling, processors=movers)
    return argmax_token(processed_logits(sampling, logits, history)), confidence
