"""Runs fewer layers for later tokens, by a schedule that all rows share; skips layers in the middle (SkipDecode).

SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, arXiv 2307.02628. As the
number of layers never grows, a layer that a token runs has been run for all tokens before it, and no cache has gaps.
The weights should be trained with the same schedule (`decoding/training/skip_decode.py`).

Departs from the paper, where the number of layers depends on the position, which all rows of a batch share: prompts
differ in length here, so it depends on the row's own count of new tokens, and a layer runs if any row needs it. Rows
that started together need the same layers until one is done. The schedule's numbers are ours: whole layers, rounded up.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.decoding.early_exit.contract import LayerPolicy
from decodax.decoding.early_exit.layer_stack import forward_stack, prefill_stack


@dataclass(frozen=True)
class SkipDecode(LayerPolicy):
    """The forward that predicts new token t (from 0) runs n(t) layers: the first `warmup` and the last n(t) - `warmup`.

    n(t) = max - floor((max - min) x t / decay_tokens) up to t = `decay_tokens`, min from then on. With max = min = all
    layers this is plain decoding.

    max_layers: at t = 0, and in prefill.
    min_layers: from `decay_tokens` on.
    decay_tokens: new tokens until `min_layers`.
    warmup: the first layers, which always run.
    Raises ValueError for numbers of layers that are not a falling schedule.

    >>> SkipDecode(max_layers=6, min_layers=3, decay_tokens=6).num_layers(jnp.arange(9)).tolist()
    [6, 6, 5, 5, 4, 4, 3, 3, 3]
    """

    max_layers: int
    min_layers: int
    decay_tokens: int
    warmup: int = 1

    auxiliary_weights = "a LoRA adapter of the layers: `decodax train skip_decode`"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.min_layers <= self.max_layers:
            raise ValueError(
                "layers must be 0 <= warmup < min_layers <= max_layers, "
                f"got warmup {self.warmup}, min_layers {self.min_layers}, max_layers {self.max_layers}"
            )
        if self.decay_tokens < 1:
            raise ValueError(f"decay_tokens must be at least 1 (tokens until min_layers), got {self.decay_tokens}")

    def num_layers(self, new_tokens: Int[Array, "*N"]) -> Int[Array, "*N"]:
        """n(t): layers of the forward after `new_tokens` new tokens."""
        span, passed = self.max_layers - self.min_layers, jnp.minimum(new_tokens, self.decay_tokens)
        return self.max_layers - span * passed // self.decay_tokens

    def active(self, index: int, total: int, num_layers: Int[Array, "*N"]) -> bool | Bool[Array, "*N"]:
        """Whether layer `index` of `total` is among the `num_layers` of a token; a bool where that never changes."""
        if index < self.warmup or index >= total - self.min_layers + self.warmup:
            return True
        if index < total - self.max_layers + self.warmup:
            return False
        return index >= total - num_layers + self.warmup

    @property
    def prefill_policy(self) -> LayerPolicy:
        return self

    def check(self, model, params):
        if self.max_layers > model.config.num_layers:
            raise ValueError(
                f"max_layers must be at most {model.config.num_layers} (layers of the model), got {self.max_layers}"
            )

    def prefill_chunk(self, model, params, state, start, chunk):
        """All tokens run `max_layers`, so nothing is decided at run time."""
        total = model.config.num_layers

        def active(index, hidden):
            return self.active(index, total, jnp.int32(self.max_layers)) is not False

        return prefill_stack(model, params, state, start, chunk, active)

    def forward(self, model, params, state, proposal, position, capture):
        after_last_token = position - (state.length[:, None] - 1)
        num_layers = self.num_layers(state.history.num_new_tokens[:, None] + after_last_token)

        def active(index, hidden):
            tokens = self.active(index, model.config.num_layers, num_layers)
            return tokens if isinstance(tokens, bool) else tokens & ~state.done[:, None]

        return forward_stack(model, params, state, proposal, position, capture, active)
