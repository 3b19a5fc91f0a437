"""Distils a draft model from a target model, and measures its acceptance rate on given text.

DistillSpec, arXiv 2310.08461: what counts for a draft is its distance to the target distribution, not to the text, so
the loss is the forward Kullback-Leibler divergence from target to draft over the whole vocabulary, at every position of
windows of text. The target stays frozen: it runs in the same compiled step and gets no gradient. Departs from the paper
in that the windows are given text alone (FastDraft, arXiv 2411.11055, likewise trains on text first), none of it
written by the models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.models.model import Model, Params

RANKS = 8  # ranks of a draft's tokens that are counted one by one


def window_logits(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token logits after every token of windows that begin at position 0."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.logits(params, model.apply(params, tokens, position).hidden)


def kl_divergence(target: Float[Array, "*N V"], draft: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """KL(target || draft) in nats of the distributions that two sets of logits give.

    >>> float(kl_divergence(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))))  # ln(2) - ln(3) / 2
    0.14384...
    """
    target_log, draft_log = jax.nn.log_softmax(target), jax.nn.log_softmax(draft)
    return jnp.sum(jnp.exp(target_log) * (target_log - draft_log), axis=-1)


@dataclass(frozen=True)
class Distillation:
    """The loss of a draft against a target on windows of text: mean KL(target || draft) per position, in nats."""

    target: Model
    draft: Model

    def loss(
        self,
        draft_params: Params,
        target_params: Params,
        rows: Int[Array | np.ndarray, "B T_plus_1"],
        step: Int[Array | np.ndarray, ""] | int = 0,
    ) -> Float[Array, ""]:
        """Reads all tokens of a row but the last, which only serves as a label elsewhere."""
        tokens = jnp.asarray(rows)[:, :-1]
        target = jax.lax.stop_gradient(window_logits(self.target, target_params, tokens))
        return kl_divergence(target, window_logits(self.draft, draft_params, tokens)).mean()


@dataclass(frozen=True)
class Acceptance:
    """How well a draft predicts its target on given text, each position after the text before it (teacher forced).

    greedy: share of positions at which both have the same most probable token.
    sampling: mean over positions of 1 - the total variation distance of the two distributions = sum of min(p, q), the
        chance that speculative sampling (arXiv 2211.17192) accepts a draft token at temperature 1.
    kl: mean KL(target || draft) in nats.
    tokens: positions measured.
    rank_acceptance: [r] is the share of positions at which the target's most probable token is the draft's r-th, from
        0; it decides the shape of trees (`decoding/tree_choice.py`).
    """

    greedy: float
    sampling: float
    kl: float
    tokens: int
    rank_acceptance: tuple[float, ...]


def tokens_per_forward(acceptance: float, draft_tokens: int) -> float:
    """Expected tokens per target forward if each draft token is accepted with this chance, independently.

    (1 - a^(C + 1)) / (1 - a): up to C accepted tokens, and one from the target.

    >>> tokens_per_forward(0.5, 4), tokens_per_forward(1.0, 4)
    (1.9375, 5.0)
    """
    return float(sum(acceptance**i for i in range(draft_tokens + 1)))


@dataclass(frozen=True)
class AcceptanceMeter:
    """Measures `Acceptance` over windows [W, T + 1], a few at a time, compiled once."""

    target: Model
    draft: Model

    def __call__(
        self, target_params: Params, draft_params: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4
    ) -> Acceptance:
        return measured(partial(_sums, self, target_params, draft_params), windows, batch)


def measured(
    sums: Callable[[Int[np.ndarray, "B T"], Bool[np.ndarray, " B"]], Float[Array, " sums"]],
    windows: Int[np.ndarray, "W T_plus_1"],
    batch: int = 4,
) -> Acceptance:
    """The acceptance over windows, `batch` at a time; `sums(tokens, counted)` gives `acceptance_sums` of a piece.

    The windows of a piece that are not `counted` are padding.
    """
    total = np.zeros(3 + RANKS)
    for start in range(0, len(windows), batch):
        piece = windows[start : start + batch, :-1]
        counted = np.arange(batch) < len(piece)  # the last piece is padded, so that one shape is compiled
        padded = np.pad(piece, ((0, batch - len(piece)), (0, 0)))
        total += np.asarray(sums(padded, counted), np.float64)
    sampling, kl, *ranks = total[1:] / total[0]
    return Acceptance(float(ranks[0]), float(sampling), float(kl), int(total[0]), tuple(map(float, ranks)))


def acceptance_sums(
    target: Float[Array, "B T V"], draft: Float[Array, "B T V"], counted: Bool[Array | np.ndarray, " B"]
) -> Float[Array, " sums"]:
    """Sums over counted positions: their number, overlap, KL, and how often each rank of the draft is right."""
    # The rank of the target's most probable token: how many tokens are more probable in the draft (of equal ones, those
    # before it).
    best = jnp.argmax(target, axis=-1)[..., None]
    score = jnp.take_along_axis(draft, best, axis=-1)
    is_before = jnp.arange(draft.shape[-1])[None, None, :] < best
    rank = jnp.sum((draft > score) | ((draft == score) & is_before), axis=-1)
    overlap = jnp.sum(jnp.minimum(jax.nn.softmax(target), jax.nn.softmax(draft)), axis=-1)
    weight = jnp.broadcast_to(jnp.asarray(counted)[:, None], overlap.shape).astype(jnp.float32)
    is_rank = [(rank == index).astype(jnp.float32) for index in range(RANKS)]
    values = (jnp.ones_like(overlap), overlap, kl_divergence(target, draft), *is_rank)
    return jnp.stack([jnp.sum(value * weight) for value in values])


@partial(jax.jit, static_argnums=0)
def _sums(
    meter: AcceptanceMeter, target_params: Params, draft_params: Params, tokens: Any, counted: Any
) -> Float[Array, " sums"]:
    target = window_logits(meter.target, target_params, tokens)
    return acceptance_sums(target, window_logits(meter.draft, draft_params, tokens), counted)
