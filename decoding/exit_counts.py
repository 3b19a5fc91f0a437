"""Counts how often the token after each early exit is the target's own, and how confident the exit was in it.

DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598 (shadow tokens).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core import pytree
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling, argmax_and_confidence
from decodax.models.model import Model

UNSEEN = 0.5  # the agreement of an exit without counts


@pytree.dataclass
class ExitCounts:
    """Decayed counts for the exit after each layer but the last.

    right, wrong: tokens.
    right_confidence, wrong_confidence: summed confidences of those tokens.
    """

    right: Float32[Array, " exits"]
    wrong: Float32[Array, " exits"]
    right_confidence: Float32[Array, " exits"]
    wrong_confidence: Float32[Array, " exits"]

    @classmethod
    def zero(cls, num_exits: int) -> "ExitCounts":
        return cls(*jnp.zeros((4, num_exits), jnp.float32))

    def decayed(self, by: Float32[Array, ""]) -> "ExitCounts":
        return jax.tree.map(lambda count: by * count, self)

    def agreement(self) -> Float32[Array, " exits"]:
        """The share of right tokens."""
        total = self.right + self.wrong
        return jnp.where(total > 0, self.right / jnp.maximum(total, 1e-9), UNSEEN)

    def threshold(self) -> Float32[Array, " exits"]:
        """The midpoint of the mean confidences in right and in wrong tokens; 0 where there were none of a kind."""
        right = self.right_confidence / jnp.maximum(self.right, 1e-9)
        wrong = self.wrong_confidence / jnp.maximum(self.wrong, 1e-9)
        return jnp.where((self.right > 0) & (self.wrong > 0), (right + wrong) / 2, 0.0)


def evaluate_exits(
    model: Model,
    params: Any,
    sampling: Sampling,
    states: Float[Array, "exits B C D"],
    target_token: Int[Array, "B C"],
    count: Int[Array, " B"],
    history: History,
) -> ExitCounts:
    """Counts of every exit's tokens against the target's, at the first `count[b]` positions of row b.

    One position after the other, as the logits of all of them at once would be large.

    sampling: the options under which an exit's token is the most probable.
    states: hidden states after each layer.
    target_token: the right tokens.
    history: at the first position.
    """

    def add(node: Int[Array, ""], carry: tuple[ExitCounts, History]) -> tuple[ExitCounts, History]:
        counts, history = carry
        hidden = jax.lax.dynamic_slice_in_dim(states, node, 1, axis=2)
        exits, batch = hidden.shape[:2]
        logits = model.logits(params, hidden.reshape(exits * batch, 1, -1)).reshape(exits, batch, -1)
        token, confidence = jax.vmap(lambda logits: argmax_and_confidence(sampling, logits, history))(logits)
        target = jax.lax.dynamic_slice_in_dim(target_token, node, 1, axis=1)
        is_right = token == target.T
        counts_here = (node < count)[None, :]
        right, wrong = is_right & counts_here, ~is_right & counts_here
        new = [jnp.sum(kind, axis=1, dtype=jnp.float32) for kind in (right, wrong)]
        new += [jnp.sum(jnp.where(kind, confidence, 0.0), axis=1) for kind in (right, wrong)]
        after = history.record(target, jnp.ones(batch, jnp.int32))
        return jax.tree.map(jnp.add, counts, ExitCounts(*new)), after

    return jax.lax.fori_loop(0, jnp.max(count), add, (ExitCounts.zero(states.shape[0]), history))[0]
