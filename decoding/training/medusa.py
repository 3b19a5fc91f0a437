"""Trains Medusa heads, each of which predicts the token at one distance ahead; the model stays frozen.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774 (Medusa-1). The loss
is the sum over heads k, from 0, of 0.8^k times the cross-entropy of head k at position t for token t + k + 2.

Departs from the paper in the labels, unless `labels="text"`: in greedy decoding a head has to predict the model's
token, not the text's, so its label is the model's most probable token there, after the text before it. And windows are
plain text, not the answers of conversations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.ranked_tokens import rank_accuracies
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.models.medusa_heads import MedusaShape, head_logits, initial_heads
from decodax.models.model import Model, Params

RANKS = 10  # ranks of a head's tokens that are counted one by one
DISTANCE_DECAY = 0.8
LABELS = ("model", "text")


@dataclass(frozen=True)
class MedusaTraining(AuxiliaryTraining):
    """Medusa-1: trains {"heads": `initial_heads`}; `shape` is a `MedusaShape`.

    labels: "model" for the target's most probable tokens, "text" for those of the text (the paper's).
    stride: the heads learn from every `stride`-th position of a window, others in every step. With a
        large vocabulary most of the work is theirs, and nearly all of the memory.
    """

    shape: MedusaShape
    labels: str = "model"
    stride: int = 1

    kind = "medusa"
    curve_title, curve_unit = "Training Medusa heads", "sum of 0.8^k x cross-entropy of head k, nats"
    curve_shares: ClassVar[Mapping[str, str]] = {f"distance_{k}": f"head {k - 1} is right" for k in range(1, 5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in LABELS:
            raise ValueError(f"labels must be one of {LABELS}, got {self.labels!r}")
        shortest = min(self.plan.short_tokens, self.plan.window_tokens)
        if not 1 <= self.stride <= shortest:
            raise ValueError(f"stride must be in 1..{shortest} (tokens of a row), got {self.stride}")
        if self.shape.heads >= shortest:
            raise ValueError(
                f"rows must hold more tokens than there are heads, {self.shape.heads}, got short_tokens {shortest}: "
                "train on longer rows or with fewer heads"
            )

    def about(self) -> dict[str, Any]:
        return super().about() | {"labels": self.labels, "stride": self.stride}

    def initial(self) -> Params:
        return {"heads": initial_heads(self.target.model.unstacked(self.target.params), self.shape)}

    def loss(self, trained, target_params, rows, step):
        rows, model = jnp.asarray(rows), self.target.model
        normed = jax.lax.stop_gradient(window_states(model, target_params, rows[:, :-1]))
        label = rows if self.labels == "text" else with_top_tokens(rows, model.read_out(target_params, normed))
        place = places(step, self.stride, normed.shape[1])
        return heads_loss(model, target_params, trained["heads"], normed, label, place, self.shape.heads)

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        return measured_heads(self.target.model, self.target.params, trained["heads"], windows, self.labels)


def window_states(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The input of the model's head at every token of windows that begin at position 0."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.normed(params, model.apply(params, tokens, position).hidden)


def with_top_tokens(rows: Int[Array, "B T_plus_1"], logits: Float32[Array, "B T V"]) -> Int[Array, "B T_plus_1"]:
    """The rows with every token but the first replaced by the model's most probable one in its place."""
    most_probable = jnp.argmax(jax.lax.stop_gradient(logits), axis=2).astype(rows.dtype)
    return jnp.concatenate([rows[:, :1], most_probable], axis=1)


def places(step: Int[Array, ""] | int, stride: int, num_tokens: int) -> Int[Array, " A"]:
    """Every `stride`-th of `num_tokens` positions, from a random one of the first; some may be after the last."""
    first = jax.random.randint(jax.random.key(step), (), 0, stride)
    return first + stride * jnp.arange(-(-num_tokens // stride), dtype=jnp.int32)


def heads_loss(
    model: Model,
    target_params: Params,
    heads: Params,
    normed: Float[Array, "B T D"],
    label: Int[Array, "B T_plus_1"],
    place: Int[Array, " A"],
    count: int,
) -> Float[Array, ""]:
    """Sum over heads of 0.8^k x mean cross-entropy over the positions `place` that have a token k + 2 ahead."""
    logits = _logits_at(model, target_params, heads, normed, place, count)
    labels, counted = _label_at(label, place, count)
    loss = _cross_entropy(logits, labels, counted)
    mean = jnp.sum(loss, axis=(0, 2)) / jnp.maximum(jnp.sum(counted, axis=(0, 2)), 1)
    return jnp.sum(mean * jnp.asarray(DISTANCE_DECAY ** np.arange(count), jnp.float32))


def _logits_at(
    model: Model,
    target_params: Params,
    heads: Params,
    normed: Float[Array, "B T D"],
    place: Int[Array, " A"],
    count: int,
) -> Float32[Array, "B I A V"]:
    """Logits of `count` heads (I of them) at some positions; after the last position, those at the last."""
    return head_logits(model, target_params, heads, normed[:, jnp.minimum(place, normed.shape[1] - 1)], count)


def _label_at(
    label: Int[Array, "B T_plus_1"], place: Int[Array, " A"], count: int
) -> tuple[Int[Array, "B I A"], Bool[Array, "B I A"]]:
    """The token that each of I heads has to predict at some positions, and where there is one."""
    last = label.shape[1] - 1
    further = place[None, :] + jnp.arange(2, count + 2, dtype=jnp.int32)[:, None]
    labels = label[:, jnp.minimum(further, last)]
    return labels, jnp.broadcast_to(further[None] <= last, labels.shape)


def _cross_entropy(
    logits: Float32[Array, "B I A V"], labels: Int[Array, "B I A"], counted: Bool[Array, "B I A"]
) -> Float32[Array, "B I A"]:
    """Cross-entropy in nats, 0 where not counted."""
    score = jnp.take_along_axis(logits, labels[..., None], axis=3)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(logits, axis=3) - score, 0)


def measured_heads(
    model: Model, target_params: Params, heads: Params, windows: Int[np.ndarray, "W T_plus_1"], labels: str
) -> dict[str, Any]:
    """The loss as in training, and how often each head predicts the model's most probable token after the given text.

    rank_accuracy: [k][r] is how often that token is the r-th most probable of head k.
    distance_1, distance_2, ...: how often it is the most probable of heads 0, 1, ...
    greedy: the first of these.
    """
    pieces = [_measured_window(model, labels, target_params, heads, row[None]) for row in windows]
    loss, ranks, counted = (np.sum([np.asarray(piece[i], np.float64) for piece in pieces], axis=0) for i in range(3))
    accuracy = ranks / counted[:, None]
    shares = {f"distance_{k + 1}": float(ranks[0]) for k, ranks in enumerate(accuracy)}
    return {
        "heldout_loss": float(np.sum(loss / counted * DISTANCE_DECAY ** np.arange(len(counted)))),
        "greedy": shares["distance_1"],
        **shares,
        "rank_accuracy": accuracy.tolist(),
        "tokens": int(windows[:, :-1].size),
    }


@partial(jax.jit, static_argnums=(0, 1))
def _measured_window(
    model: Model, labels: str, target_params: Params, heads: Params, rows: Int[Array | np.ndarray, "B T_plus_1"]
) -> tuple[Float[Array, " K"], Float[Array, "K R"], Int[Array, " K"]]:
    """Per head, over some windows: summed cross-entropy, how often each rank is right, positions counted."""
    rows, count = jnp.asarray(rows), len(heads)
    normed = window_states(model, target_params, rows[:, :-1])
    most_probable = with_top_tokens(rows, model.read_out(target_params, normed))
    place = jnp.arange(normed.shape[1], dtype=jnp.int32)
    logits = _logits_at(model, target_params, heads, normed, place, count)
    loss = _cross_entropy(logits, *_label_at(rows if labels == "text" else most_probable, place, count))
    expected, counted = _label_at(most_probable, place, count)
    ranks = [rank_accuracies(logits[:, k], expected[:, k], counted[:, k], RANKS) for k in range(count)]
    return jnp.sum(loss, axis=(0, 2)), jnp.stack(ranks), jnp.sum(counted, axis=(0, 2))
