"""Trains the adapter of a Kangaroo drafter, which predicts the target's distribution from an early layer's state.

Kangaroo, arXiv 2404.18911: only the adapter learns, by cross entropy with the target's whole distribution at every
position. Cross entropy and KL(target || draft) have the same gradients; the loss here is the latter, which is 0 for a
perfect adapter. Departs from the paper in how the adapter starts: not at random, but as the attention of the first
layer skipped and the target's own last norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters.kangaroo import exit_adapter
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import acceptance_sums, kl_divergence, measured, tokens_per_forward
from decodax.models.model import Model, Params

MOST_TOKENS = 8  # the longest draft whose expected tokens are reported


@dataclass(frozen=True)
class KangarooShape:
    """exit_layer: layers of the target that draft. The paper has 2 of 32 and 3 of 40."""

    exit_layer: int = 2


def initial_adapter(model: Model, params: Params, exit_layer: int) -> Params:
    """The adapter as the attention of the target's layer after the exit and the target's last norm, in float32."""
    exit_adapter(model, exit_layer)
    block = params[f"blocks_{exit_layer}"]
    final = params.get("final_norm", block.get("mixer_norm"))
    adapter = {"mixer": block["mixer"], "mixer_norm": block.get("mixer_norm", final), "final_norm": final}
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), adapter)


def target_and_draft_logits(
    model: Model, exit_layer: int, trained: Params, target_params: Params, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """Next-token logits of both after every token of windows that begin at position 0; no gradient to the target."""
    frozen = jax.lax.stop_gradient(target_params)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    out = model.apply(frozen, tokens, position, capture=(exit_layer,))
    adapter = exit_adapter(model, exit_layer)
    normed, _ = adapter.apply(trained["adapter"], out.captured[exit_layer], position)
    return model.logits(frozen, out.hidden), model.read_out(frozen, normed)


def expected_tokens_per_full_forward(acceptance: float, exit_layer: int, num_layers: int, draft_tokens: int) -> float:
    """Expected tokens per `num_layers` layers run, for drafts of one length whose tokens are accepted independently.

    (1 - a^(C + 1)) / (1 - a) tokens per round of l (C + 1) + L - l layers: the last token and each draft token run
    through the first l, all at once through the others. A draft that ends when it is unsure does better.

    >>> expected_tokens_per_full_forward(0.5, 2, 8, 2)  # 1.75 tokens for 12 layers
    1.1666666666666667
    """
    layers = exit_layer * (draft_tokens + 1) + num_layers - exit_layer
    return tokens_per_forward(acceptance, draft_tokens) * num_layers / layers


@dataclass(frozen=True)
class KangarooTraining(AuxiliaryTraining):
    """The training of an adapter; `shape` is a `KangarooShape`.

    Raises ValueError for an exit after the last layer.
    """

    shape: KangarooShape

    kind = "kangaroo"
    curve_title, curve_unit = "Distilling the adapter of an early exit", "KL(target || draft), nats"
    curve_shares: ClassVar[Mapping[str, str]] = {
        "greedy": "same most probable token",
        "sampling": "1 - total variation",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        exit_adapter(self.target.model, self.shape.exit_layer)

    def initial(self) -> Params:
        return {"adapter": initial_adapter(self.target.model, self.target.params, self.shape.exit_layer)}

    def loss(self, trained, target_params, rows, step):
        tokens = jnp.asarray(rows)[:, :-1]
        target, draft = target_and_draft_logits(
            self.target.model, self.shape.exit_layer, trained, target_params, tokens
        )
        return kl_divergence(target, draft).mean()

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        sums = partial(_sums, self.target.model, self.shape.exit_layer, trained, self.target.params)
        found = measured(sums, windows)
        return {
            "heldout_loss": found.kl,
            "greedy": found.greedy,
            "sampling": found.sampling,
            "tokens": found.tokens,
            "rank_accuracy": [list(found.rank_acceptance)],
        }

    def derived(self, heldout: dict[str, Any]) -> dict[str, Any]:
        expected = [
            expected_tokens_per_full_forward(
                heldout["greedy"], self.shape.exit_layer, self.target.config.num_layers, count
            )
            for count in range(1, MOST_TOKENS + 1)
        ]
        return {"greedy_tokens_per_full_forward": expected}


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    model: Model, exit_layer: int, trained: Params, target_params: Params, tokens: Any, counted: Any
) -> Float[Array, " sums"]:
    target, draft = target_and_draft_logits(model, exit_layer, trained, target_params, jnp.asarray(tokens))
    return acceptance_sums(target, draft, counted)
