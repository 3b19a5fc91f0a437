"""Skips layers per row: trained layer gates decide on the prompt which layers the whole text runs (FiRST).

FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513. A layer gate
reads its layer's input. In prefill the probabilities to skip are averaged over the prompt's tokens, which gives one bit
per layer and row; it stays for the whole text, so a row never attends to a layer that it skipped.

Departs from the paper: the decision is made on the first tokens of the prompt (`DECIDING_TOKENS`) without its last one,
which has not run yet; a prompt of one token therefore runs all layers. The input of the layer gates is scaled to a root
mean square of 1, so that one learning rate suits all layers. The first and the last layer always run.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS, is_prefilled
from decodax.decoding.early_exit.contract import LayerPolicy
from decodax.decoding.early_exit.layer_stack import forward_stack, prefill_stack
from decodax.models.model import Model, Params

DECIDING_TOKENS = MAX_CHUNK_TOKENS  # all in the first chunk, which is larger where devices split it


def skip_probability(
    layer_gates: Params, index: int, hidden: Float[Array, "B T D"], counted: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """The probability to skip layer `index`: the mean over the counted tokens, 0 where there are none.

    sigmoid(weight . hidden / rms(hidden) + bias) for a token.

    layer_gates: their weights.
    hidden: the layer's input.
    counted: which tokens count.
    """
    hidden = hidden.astype(jnp.float32)
    hidden = hidden * jax.lax.rsqrt(jnp.mean(jnp.square(hidden), axis=-1, keepdims=True) + 1e-6)
    weight, bias = (layer_gates[name][index].astype(jnp.float32) for name in ("weight", "bias"))
    skip = jnp.where(counted, jax.nn.sigmoid(jnp.einsum("btd,d->bt", hidden, weight) + bias), 0.0)
    return jnp.sum(skip, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1).astype(jnp.float32)


@dataclass(frozen=True)
class RoutedLayers(LayerPolicy):
    """A row skips a layer where its prompt's mean probability to skip is above `threshold`.

    The layer gates are in the target's parameters: params["layer_gates"] = {"weight": [L, D], "bias": [L]}. State:
    Bool[B, L], the layers that each row runs.

    threshold: in 0..1.
    kept_first, kept_last: the first and the last layers that always run.
    """

    threshold: float = 0.5
    kept_first: int = 1
    kept_last: int = 1

    auxiliary_weights = (
        "layer gates, `decodax train first_gates`, and a LoRA adapter of the layers, `decodax train first`"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in 0..1 (a probability to skip), got {self.threshold}")
        if self.kept_first < 0 or self.kept_last < 0:
            raise ValueError(f"kept layers must be 0 or more, got {self.kept_first} first and {self.kept_last} last")

    def is_routed(self, index: int, total: int) -> bool:
        """Whether a layer gate decides on layer `index` of `total`."""
        return self.kept_first <= index < total - self.kept_last

    def check(self, model, params):
        shape = (model.config.num_layers, model.config.hidden_size)
        layer_gates = params.get("layer_gates", {})
        found = {name: getattr(layer_gates.get(name), "shape", None) for name in ("weight", "bias")}
        if found != {"weight": shape, "bias": shape[:1]}:
            raise ValueError(
                f"params['layer_gates'] must hold weight {shape} and bias {shape[:1]}, got {found}: "
                "train layer gates for this model (`decodax train first_gates`)"
            )

    @property
    def prefill_policy(self) -> LayerPolicy:
        return self

    def start(self, model: Model, params: Params, batch_size: int) -> Bool[Array, "B L"]:
        return jnp.ones((batch_size, model.config.num_layers), bool)

    def prefill_chunk(self, model, params, state, start, chunk):
        """The first chunk decides layer by layer, each on its input after the decisions before it."""
        total, real = model.config.num_layers, is_prefilled(state.length, start, chunk)
        counted = real & (jnp.arange(chunk) < DECIDING_TOKENS)[None, :]
        decided: list[Any] = [state.layer_policy[:, index] for index in range(total)]

        def active(index, hidden):
            if not self.is_routed(index, total):
                return True
            keep = ~(skip_probability(params["layer_gates"], index, hidden, counted) > self.threshold)
            decided[index] = jnp.where(start == 0, keep, state.layer_policy[:, index])
            return decided[index][:, None] & real

        state = prefill_stack(model, params, state, start, chunk, active)
        return replace(state, layer_policy=jnp.stack(decided, axis=1))

    def forward(self, model, params, state, proposal, position, capture):
        def active(index, hidden):
            if not self.is_routed(index, model.config.num_layers):
                return True
            return (state.layer_policy[:, index] & ~state.done)[:, None]

        return forward_stack(model, params, state, proposal, position, capture, active)
