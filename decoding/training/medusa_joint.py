"""Trains Medusa heads together with a LoRA adapter of the model, which becomes easier to predict (Medusa-2).

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774 (Medusa-2). The model
gets a LoRA adapter (arXiv 2106.09685), and the loss is L_model + 0.2 L_heads, with the heads on the changed
model's states. L_model keeps the model what it was: the divergence from the original, which is the changed model with
its change switched off (the paper's self-distillation), or the cross-entropy of the text. The warm-up is the paper's
two-stage one: it starts from heads that have been trained alone.

What is decoded with these weights is the changed model's text, whichever verifier checks it. Departs from the paper in
that the change learns slower than the heads by a factor on the change and not on the learning rate.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.decoding.training.distillation import kl_divergence
from decodax.decoding.training.medusa import (
    MedusaTraining,
    heads_loss,
    measured_heads,
    places,
    window_states,
    with_top_tokens,
)
from decodax.layers.adapters.low_rank import low_rank_change, merged
from decodax.models.medusa_heads import MedusaShape, check_heads
from decodax.models.model import Model, Params

HEADS_WEIGHT = 0.2  # lambda_0 of the paper
KEEPS = ("model", "text")


@dataclass(frozen=True)
class MedusaJointShape(MedusaShape):
    """Heads as in `MedusaShape`, and the change.

    rank: of the change.
    change_scale: the factor on the change; the paper's heads learn four times as fast as its model.
    """

    rank: int = 16
    change_scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.change_scale > 0:
            raise ValueError(f"rank and change_scale must be positive, got {self.rank} and {self.change_scale}")


@dataclass(frozen=True)
class MedusaJointTraining(MedusaTraining):
    """Medusa-2: trains {"heads": ..., "low_rank": `low_rank_change`}; `shape` is a `MedusaJointShape`.

    start: weights of heads of the same shape that were trained alone.
    keep: what L_model is, "model" for the divergence from the original model, "text" for the cross-entropy of the text.
    """

    shape: MedusaJointShape
    start: AuxiliaryWeights = field(kw_only=True)
    keep: str = "model"

    curve_title, curve_unit = "Training Medusa heads and model", "L_model + 0.2 L_heads, nats"
    curve_shares: ClassVar[Mapping[str, str]] = {
        "unchanged": "the model's most probable token as before",
        **MedusaTraining.curve_shares,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in KEEPS:
            raise ValueError(f"keep must be one of {KEEPS}, got {self.keep!r}")
        if self.start.kind != self.kind or set(self.start.params) != {"heads"}:
            raise ValueError(
                f"start must be Medusa heads that were trained alone, got {self.start.name or 'weights'}, which holds "
                f"{self.start.kind!r} with {sorted(self.start.params)}: make them with `decodax train medusa`"
            )
        heads = self.start.params["heads"]
        check_heads(self.target.model, heads)
        found = (len(heads), len(heads["head_0"]) - ("out" in heads["head_0"]), "out" not in heads["head_0"])
        if found != (self.shape.heads, self.shape.blocks, self.shape.tied):
            raise ValueError(
                "the heads to start from must have the shape that is trained, (heads, blocks, tied) "
                f"{(self.shape.heads, self.shape.blocks, self.shape.tied)}, got {found}"
            )

    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.start.params):
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return super().about() | {"keep": self.keep, "start": digest.hexdigest()[:16]}

    def initial(self) -> Params:
        heads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), self.start.params["heads"])
        return {
            "heads": heads,
            "low_rank": low_rank_change(self.target.params, self.shape.rank, jax.random.key(self.plan.seed)),
        }

    def changed(self, target_params: Params, trained: Params) -> Params:
        """The target's parameters with the change."""
        return merged(target_params, trained["low_rank"], self.shape.change_scale)

    def loss(self, trained, target_params, rows, step):
        rows, model = jnp.asarray(rows), self.target.model
        changed = self.changed(target_params, trained)
        normed = window_states(model, changed, rows[:, :-1])
        logits = model.read_out(changed, normed)
        if self.keep == "model":
            original = model.read_out(target_params, window_states(model, target_params, rows[:, :-1]))
            model_loss = jnp.mean(kl_divergence(jax.lax.stop_gradient(original), logits))
        else:
            score = jnp.take_along_axis(logits, rows[:, 1:, None], axis=2)[..., 0]
            model_loss = jnp.mean(jax.nn.logsumexp(logits, axis=2) - score)
        label = rows if self.labels == "text" else with_top_tokens(rows, logits)
        place = places(step, self.stride, normed.shape[1])
        loss_of_heads = heads_loss(model, changed, trained["heads"], normed, label, place, self.shape.heads)
        return model_loss + HEADS_WEIGHT * loss_of_heads

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        """As for heads alone, with the changed model, and how far that is from the original.

        unchanged: share of positions at which both have the same most probable token.
        kl: KL(original || changed), nats.
        """
        model, target_params = self.target.model, self.target.params
        changed = self.changed(target_params, trained)
        found = measured_heads(model, changed, trained["heads"], windows, self.labels)
        rows = [np.asarray(_compared(model, target_params, changed, row[None]), np.float64) for row in windows]
        kl, unchanged, text_loss = np.mean(rows, axis=0)
        model_loss = kl if self.keep == "model" else text_loss
        loss = float(model_loss + HEADS_WEIGHT * found["heldout_loss"])
        return found | {"heldout_loss": loss, "kl": float(kl), "unchanged": float(unchanged)}


@partial(jax.jit, static_argnums=0)
def _compared(
    model: Model, params: Params, changed: Params, rows: Int[Array | np.ndarray, "B T_plus_1"]
) -> Float[Array, " numbers"]:
    """Means over windows: KL(original || changed), share of equal argmax tokens, cross-entropy of the changed model."""
    rows = jnp.asarray(rows)
    one, other = (model.read_out(p, window_states(model, p, rows[:, :-1])) for p in (params, changed))
    score = jnp.take_along_axis(jax.nn.log_softmax(other), rows[:, 1:, None], axis=2)
    is_same = (jnp.argmax(one, axis=2) == jnp.argmax(other, axis=2)).astype(jnp.float32)
    return jnp.stack([jnp.mean(kl_divergence(one, other)), jnp.mean(is_same), -jnp.mean(score)])
