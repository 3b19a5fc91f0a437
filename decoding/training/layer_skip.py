"""Trains a LoRA adapter of a model for early exit, after which the head can read the states of its first layers.

LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710. Two things are trained
together. Layer dropout: each row of a step skips layer l with a chance that grows with l, so that the model depends
less on its last layers. The early-exit loss: the shared final norm and head are applied after layers before the last,
too.

Departs from the paper: only a LoRA adapter of the layers is trained, and not the whole model. Every exit, the last
one included, is distilled from the distributions of the unchanged model (self-distillation), not trained on the text's
tokens. The weight of an exit is a power of its layer; the paper's grows with the square, which leaves the first exits
of a model of few layers next to nothing, so here all weigh the same by default. Exits in the upper half of the layers
are not trained by default: a draft from there hardly pays. The paper rotates through sets of every R-th exit; here each
step trains `exits_per_step` exits, evenly spread, and the set moves on by one layer from step to step.

The changed model is another model than the original: what decodes with it is compared with its own plain decoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.exit_choice import best_exit, tokens_per_layer
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.layers.adapters.low_rank import low_rank_change, merged
from decodax.models.model import Model, Params

MEASURED_ROWS = 4  # windows per forward when the exits are measured
DRAFT_TOKENS = 6  # the longest draft among which the best fixed setting is reported


@dataclass(frozen=True)
class LayerSkipShape:
    """The LoRA adapter and its training.

    rank: of the change of every matrix.
    max_dropout: the chance that a row skips the last layer in a step.
    exit_scale, exit_power: the exit after l of L layers weighs exit_scale x (l / L)^exit_power, the last one 1.
    exit_share: early exits are trained after up to this share of the layers, and after one layer at least.
    exits_per_step: exits before the last that a step trains; each costs a pass through the head.
    """

    rank: int = 16
    max_dropout: float = 0.1
    exit_scale: float = 1.0
    exit_power: float = 0.0
    exit_share: float = 0.5
    exits_per_step: int = 2

    def __post_init__(self) -> None:
        if self.rank < 1 or self.exits_per_step < 1:
            raise ValueError(f"rank and exits_per_step must be at least 1, got {self.rank} and {self.exits_per_step}")
        if not 0 <= self.max_dropout <= 1:
            raise ValueError(f"max_dropout must be in 0..1 (a chance), got {self.max_dropout}")
        if not 0 < self.exit_share <= 1:
            raise ValueError(f"exit_share must be above 0 and at most 1, got {self.exit_share}")
        if not self.exit_scale > 0 or not self.exit_power >= 0:
            raise ValueError(
                f"exit_scale must be above 0 and exit_power at least 0, got {self.exit_scale} and {self.exit_power}"
            )


def dropout_rates(num_layers: int, max_dropout: float) -> Float[np.ndarray, " L"]:
    """The chance that a row skips each layer: max_dropout x (2^(l / (L - 1)) - 1), none for the first.

    >>> dropout_rates(3, 0.5).round(3).tolist()
    [0.0, 0.207, 0.5]
    """
    return max_dropout * (2 ** (np.arange(num_layers) / (num_layers - 1)) - 1)


def exits_of_step(step: Int[Array, ""] | int, num_exits: int, per_step: int) -> Int[Array, " per_step"]:
    """After how many layers a step exits: evenly spread over 1 .. num_exits, one further at every step.

    >>> [exits_of_step(step, 7, 2).tolist() for step in range(4)]
    [[1, 4], [2, 5], [3, 6], [4, 7]]
    """
    apart = np.arange(per_step, dtype=np.int32) * num_exits // per_step
    return 1 + (jnp.asarray(step, jnp.int32) + apart) % num_exits


def hidden_states(
    model: Model, params: Params, tokens: Int[Array, "B T"], dropped: Bool[Array, "L B"]
) -> Float[Array, "L B T D"]:
    """Hidden states after each layer, in windows that begin at position 0; a row skips the layers in `dropped`."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, states = model.embed(params, tokens, position), []
    for index in range(model.config.num_layers):
        out = model.apply(params, hidden, position, layers=(index, index + 1))
        hidden = jnp.where(dropped[index][:, None, None], hidden, out.hidden)
        states.append(hidden)
    return jnp.stack(states)


@dataclass(frozen=True)
class LayerSkipTraining(AuxiliaryTraining):
    """The training of `layer_skip` weights, {"low_rank": the change}; `shape` is a `LayerSkipShape`."""

    shape: LayerSkipShape

    kind = "layer_skip"
    curve_title, curve_unit = "Teaching a model to exit early", "weighted KL(model || exits), nats"
    curve_shares: ClassVar[Mapping[str, str]] = {
        "greedy": "last exit: the unchanged model's token",
        "early_agreement": "mean early exit: the last exit's token",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_exits < 1:
            raise ValueError("an early exit needs a model of at least 2 layers, got 1")
        if self.shape.exits_per_step > self.num_trained_exits:
            raise ValueError(
                f"exits_per_step must be at most {self.num_trained_exits} (the exits that are trained), got "
                f"{self.shape.exits_per_step}"
            )

    @property
    def num_exits(self) -> int:
        return self.target.config.num_layers - 1

    @property
    def num_trained_exits(self) -> int:
        return min(self.num_exits, max(1, int(self.shape.exit_share * (self.num_exits + 1))))

    def initial(self) -> Params:
        return {"low_rank": low_rank_change(self.target.params, self.shape.rank, jax.random.key(self.plan.seed))}

    def loss(self, trained, target_params, rows, step):
        """sum_i w_i KL(unchanged model || exit i) / sum_i w_i, over the last exit and those of the step."""
        model, shape, tokens = self.target.model, self.shape, jnp.asarray(rows)[:, :-1]
        target = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
        params = merged(target_params, trained["low_rank"])
        rates = jnp.asarray(dropout_rates(self.num_exits + 1, shape.max_dropout), jnp.float32)
        key = jax.random.fold_in(jax.random.key(self.plan.seed), step)
        dropped = jax.random.uniform(key, (len(rates), len(tokens))) < rates[:, None]
        states = hidden_states(model, params, tokens, dropped)
        early = exits_of_step(step, self.num_trained_exits, shape.exits_per_step)
        share = early.astype(jnp.float32) / len(rates)
        weight = jnp.concatenate([shape.exit_scale * share**shape.exit_power, jnp.ones(1)])
        place = jnp.concatenate([early, jnp.array([len(rates)], jnp.int32)]) - 1
        distance = [kl_divergence(target, model.logits(params, states[place[i]])).mean() for i in range(len(weight))]
        return jnp.sum(weight * jnp.stack(distance)) / jnp.sum(weight)

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        """Measures the changed model.

        heldout_loss: KL(unchanged model || changed model).
        greedy: how often both have the same most probable token.
        exit_agreement: [l - 1] is how often the token after l layers is that of the changed model after all layers.
        early_agreement: their mean.
        """
        changed = merged(self.target.params, trained["low_rank"])
        sums = np.zeros(3 + self.num_exits)
        for start in range(0, len(windows), MEASURED_ROWS):
            piece = windows[start : start + MEASURED_ROWS, :-1]
            counted = np.arange(MEASURED_ROWS) < len(piece)  # the last piece is padded: one shape is compiled
            padded = np.pad(piece, ((0, MEASURED_ROWS - len(piece)), (0, 0)))
            sums += np.asarray(_sums(self.target.model, self.target.params, changed, padded, counted), np.float64)
        loss, greedy, *agreement = (sums[1:] / sums[0]).tolist()
        return {
            "heldout_loss": loss,
            "greedy": greedy,
            "early_agreement": float(np.mean(agreement)),
            "exit_agreement": agreement,
            "tokens": int(sums[0]),
        }

    def derived(self, heldout: dict[str, Any]) -> dict[str, Any]:
        """The best fixed exit layer and draft length for the measured agreement, and their expected tokens."""
        agreement, num_layers = np.asarray(heldout["exit_agreement"]), self.num_exits + 1
        layer, tokens = (int(x) for x in best_exit(agreement, num_layers, DRAFT_TOKENS, min_tokens=1))
        expected = float(tokens_per_layer(agreement, num_layers, DRAFT_TOKENS)[layer - 1, tokens]) * num_layers
        return {"best": {"exit_layer": layer, "draft_tokens": tokens, "tokens_per_full_forward": expected}}


@partial(jax.jit, static_argnums=0)
def _sums(model: Model, params: Params, changed: Params, tokens: Any, counted: Any) -> Float[Array, " sums"]:
    """Sums over counted positions: their number, KL, and how often the last exit and each early one agree."""
    none = jnp.zeros((model.config.num_layers, len(tokens)), bool)
    target, states = window_logits(model, params, tokens), hidden_states(model, changed, tokens, none)
    logits = model.logits(changed, states[-1])
    own = jnp.argmax(logits, axis=-1)
    # One exit after the other: the logits of all of them at once would be large.
    agrees = jax.lax.map(lambda hidden: jnp.argmax(model.logits(changed, hidden), axis=-1) == own, states[:-1])
    values = (jnp.ones(own.shape), kl_divergence(target, logits), jnp.argmax(target, axis=-1) == own, *agrees)
    weight = jnp.broadcast_to(counted[:, None], tokens.shape).astype(jnp.float32)
    return jnp.stack([jnp.sum(value.astype(jnp.float32) * weight) for value in values])
