"""Each text leaves out the layers that its prompt did not need: small routers decide once, decoding follows.

FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513. A layer's router
looks at the layer's input. While the prompt is read the chances to skip are averaged over its tokens, which gives one
bit per layer and row; it stays for the whole text, so a row never reads from a layer that it skipped.

Departs from the paper: the decision is made on the first chunk of the prompt (up to 512 tokens) without its last token,
which is still to be run; a prompt of one token therefore runs all layers. The routers' input is scaled to a root mean
square of 1, so that one learning rate suits all layers. The first and the last layer always run.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from decodax.decoding.depth._contract import Depth
from decodax.decoding.depth._stack import forward_stack, read_prompt_stack
from decodax.decoding.prompt_reading import is_read
from decodax.decoding.state import PromptReader
from decodax.models.model import Model, Params


def skip_probability(
    routers: Params, index: int, hidden: Float[Array, "B T D"], counted: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """The chance to skip layer `index`, whose input this is: the mean over the tokens counted, 0 where there are none.

    sigmoid(weight . hidden / rms(hidden) + bias) for a token.
    """
    hidden = hidden.astype(jnp.float32)
    hidden = hidden * jax.lax.rsqrt(jnp.mean(jnp.square(hidden), axis=-1, keepdims=True) + 1e-6)
    weight, bias = (routers[name][index].astype(jnp.float32) for name in ("weight", "bias"))
    skip = jnp.where(counted, jax.nn.sigmoid(jnp.einsum("btd,d->bt", hidden, weight) + bias), 0.0)
    return jnp.sum(skip, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1).astype(jnp.float32)


@dataclass(frozen=True)
class RoutedLayers(Depth):
    """A row skips a layer where its prompt's mean chance to skip is above `threshold`.

    The first `kept_first` and the last `kept_last` layers always run. The routers stand in the target's parameters:
    params["routers"] = {"weight": [L, D], "bias": [L]}. State: Bool[B, L], the layers that each row runs.
    """

    threshold: float = 0.5
    kept_first: int = 1
    kept_last: int = 1

    trained_part = "routers, `decodax train first_routers`, and a low-rank change of the layers, `decodax train first`"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in 0..1 (a chance to skip), got {self.threshold}")
        if self.kept_first < 0 or self.kept_last < 0:
            raise ValueError(f"kept layers must be 0 or more, got {self.kept_first} first and {self.kept_last} last")

    def is_routed(self, index: int, total: int) -> bool:
        """Whether a router decides on layer `index` of `total`."""
        return self.kept_first <= index < total - self.kept_last

    def check(self, model, params):
        shape = (model.config.num_layers, model.config.hidden_size)
        routers = params.get("routers", {})
        found = {name: getattr(routers.get(name), "shape", None) for name in ("weight", "bias")}
        if found != {"weight": shape, "bias": shape[:1]}:
            raise ValueError(
                f"params['routers'] must hold weight {shape} and bias {shape[:1]}, got {found}: "
                "train routers for this model (`decodax train first_routers`)"
            )

    @property
    def prompt_reader(self) -> PromptReader:
        return self

    def start(self, model: Model, params: Params, batch_size: int) -> Bool[Array, "B L"]:
        return jnp.ones((batch_size, model.config.num_layers), bool)

    def read_prompt(self, model, params, state, start, chunk):
        """The first chunk decides layer by layer, each on what the decisions before it made of the prompt."""
        total, real = model.config.num_layers, is_read(state.length, start, chunk)
        decided: list[Any] = [state.depth[:, index] for index in range(total)]

        def active(index, hidden):
            if not self.is_routed(index, total):
                return True
            keep = ~(skip_probability(params["routers"], index, hidden, real) > self.threshold)
            decided[index] = jnp.where(start == 0, keep, state.depth[:, index])
            return decided[index][:, None] & real

        state = read_prompt_stack(model, params, state, start, chunk, active)
        return replace(state, depth=jnp.stack(decided, axis=1))

    def forward(self, model, params, state, proposal, position, capture):
        def active(index, hidden):
            if not self.is_routed(index, model.config.num_layers):
                return True
            return (state.depth[:, index] & ~state.done)[:, None]

        return forward_stack(model, params, state, proposal, position, capture, active)
