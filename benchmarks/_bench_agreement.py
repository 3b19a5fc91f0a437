"""Checks whether a scheme gives plain decoding's tokens, and where not, how close the two best logits were.

At every step of plain decoding the gap between the two best logits is kept. Two programs that compute the same in
another order may choose differently only where rounding can close that gap, and `Steps` holds both.

**The bound.** One forward rounds the residual stream to its dtype after each of the 2L additions of its L layers, by at
most u|h_i| in coordinate i, where u = eps / 2 (2**-8 in bfloat16). If later layers pass on their input,
two runs end at most  2 x 2u x sum over layers of |h_i|  apart in coordinate i (two runs, two additions per layer). The
difference of the two best logits has the gradient g with respect to the last hidden state, so to first order it moves
by at most

    bound = 4 u x sum over i of |g_i| x (sum over layers of |h_i|).

The roundings of norm and head are not in it, and errors of one sign everywhere, which the sum allows for, do not
happen: of the two the second is by far the larger. Were the roundings independent and even within u|h_i|, the gap would
move by a standard deviation of

    spread = u x sqrt(4 / 3 x sum over i and layers of (g_i h_i)^2),

which is the scale for the gaps where texts do diverge.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks._bench_runs import Batch, Runner, Trace
from decodax.decoding.state import DecodeState
from decodax.decoding.training.distillation import window_logits
from decodax.models.model import Model, Params

TIE = 1e-5  # of the largest logit: closer than this, float32 leaves the choice open


@dataclasses.dataclass(frozen=True)
class Steps:
    """Plain decoding of some rows.

    new: tokens.
    gap: of the best two logits at each.
    largest: of the logits' absolute values.
    bound, spread: of the gap, as defined above.
    """

    new: Int[np.ndarray, "B A"]
    gap: Float[np.ndarray, "B A"]
    largest: Float[np.ndarray, "B A"]
    bound: Float[np.ndarray, "B A"]
    spread: Float[np.ndarray, "B A"]

    @classmethod
    def concatenated(cls, batches: Sequence["Steps"]) -> "Steps":
        """The rows of all batches, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a scheme's rows compare with plain decoding's.

    same_rows: identical throughout.
    ties: rows that diverge where plain decoding's best two are closer than TIE of the largest (what follows is another
        text).
    wrong_rows: those that diverge elsewhere.
    same_tokens: share of all tokens that come before the row diverges.
    gaps, bounds, spreads: at each first difference.
    """

    rows: int
    same_rows: int
    ties: int
    wrong_rows: int
    same_tokens: float
    gaps: tuple[float, ...]
    bounds: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def passes(self) -> bool:
        return self.wrong_rows == 0

    @property
    def within_bound(self) -> bool:
        return all(gap <= bound for gap, bound in zip(self.gaps, self.bounds, strict=True))

    def as_numbers(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "same_rows": self.same_rows,
            "ties": self.ties,
            "wrong_rows": self.wrong_rows,
            "same_tokens": self.same_tokens,
        }


def compare(new: Int[np.ndarray, "B A"], plain: Steps) -> Agreement:
    """The scheme's tokens against plain decoding's, row by row, up to the first difference of each.

    Raises ValueError for another number of rows or tokens.
    """
    if new.shape != plain.new.shape:
        raise ValueError(f"expected tokens of shape {plain.new.shape} (rows, new tokens), got {new.shape}")
    differs = new != plain.new
    row = np.flatnonzero(differs.any(axis=1))
    first = np.argmax(differs, axis=1)
    at = (row, first[row])
    is_tie = plain.gap[at] < TIE * plain.largest[at]
    before = np.where(differs.any(axis=1), first, new.shape[1])
    return Agreement(
        rows=len(new),
        same_rows=len(new) - len(row),
        ties=int(is_tie.sum()),
        wrong_rows=int((~is_tie).sum()),
        same_tokens=float(before.sum() / new.size),
        gaps=tuple(map(float, plain.gap[at])),
        bounds=tuple(map(float, plain.bound[at])),
        spreads=tuple(map(float, plain.spread[at])),
    )


def share_followed(model: Model, params: Params, traces: Sequence[Trace]) -> float:
    """Share of new tokens that greedy plain decoding would have written after the same text.

    Unlike `same_tokens`, one other token does not count against all that come after it.
    """
    followed = total = 0
    for trace in traces:
        choice = np.asarray(_choices(model, params, trace.state.tokens))
        followed += int(np.sum(np.take_along_axis(choice, before_new(trace), axis=1) == trace.new))
        total += trace.new.size
    return followed / total


def before_new(trace: Trace) -> Int[np.ndarray, "B A"]:
    """The index in a row's buffer of the token before each new one."""
    num_new = trace.new.shape[1]
    return np.asarray(trace.state.length)[:, None] - num_new + np.arange(num_new)[None, :] - 1


@partial(jax.jit, static_argnums=0)
def _choices(model: Model, params: Params, tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The most probable next token after every token; row by row, as the logits of all rows would be large."""

    def of_row(row: Int[Array, " S"]) -> Int[Array, " S"]:
        return jnp.argmax(window_logits(model, params, row[None])[0], axis=1).astype(jnp.int32)

    return jax.lax.map(of_row, tokens)


def rounding(
    gradient: Float[Array, "B D"], streams: Sequence[Float[Array, "B D"]], unit_roundoff: float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Bound and spread as defined above; `streams` are the hidden states after each layer."""
    wide = gradient.astype(jnp.float32)
    moved = jnp.stack([jnp.abs(wide * stream.astype(jnp.float32)) for stream in streams])
    bound = 4 * unit_roundoff * jnp.sum(moved, axis=(0, 2))
    return bound, unit_roundoff * jnp.sqrt(4 / 3 * jnp.sum(moved**2, axis=(0, 2)))


def _look(model: Model, params: Params, state: DecodeState) -> tuple[Array, Array, Array, Array]:
    """Gap, largest logit, bound and spread at the next step of plain decoding."""
    layers = tuple(range(1, model.config.num_layers + 1))
    out = model.apply(params, state.last_token()[:, None], state.length[:, None] - 1, state.caches, capture=layers)
    logits, pull_back = jax.vjp(lambda hidden: model.logits(params, hidden), out.hidden)
    best, token = jax.lax.top_k(logits[:, 0], 2)
    signs = jnp.asarray([1.0, -1.0], jnp.float32)[None, :, None]
    towards = jnp.sum(jax.nn.one_hot(token, logits.shape[-1]) * signs, axis=1)
    (gradient,) = pull_back(towards[:, None])
    roundoff = float(jnp.finfo(out.hidden.dtype).eps) / 2
    bound, spread = rounding(gradient[:, 0], [out.captured[index][:, 0] for index in layers], roundoff)
    return best[:, 0] - best[:, 1], jnp.max(jnp.abs(logits[:, 0]), axis=1), bound, spread


_look_jitted = jax.jit(_look, static_argnums=0)


def plain_steps(runner: Runner, prompts: Batch) -> Steps:
    """Plain greedy decoding of a batch, with the gaps of its logits at every step."""
    seen: list[list[np.ndarray]] = []

    def look(state: DecodeState) -> None:
        seen.append([np.asarray(value) for value in _look_jitted(runner.model, runner.params, state)])

    trace = runner.trace(prompts, look=look)
    return Steps(trace.new, *(np.stack(values, axis=1) for values in zip(*seen, strict=True)))
