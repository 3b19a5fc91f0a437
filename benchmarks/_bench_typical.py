"""Measures typical acceptance at temperature 1, where it is lossy: its gain, and how far it leaves the distribution.

Greedily typical acceptance is exact, so only sampled text can show what it does. Medusa's heads draft one tree for all:
with the exact match, which writes plain decoding's tokens with the same random numbers, and with typical acceptance.

**How far it leaves the distribution.** Sampled texts diverge by chance, so tokens are not compared one by one. Instead
the distribution p that plain decoding draws from is computed after the very text that a scheme has written, with two
numbers: how likely the token x written next is, ln p(x), and how likely one drawn from p is on average, sum over v of
p(v) ln p(v). For plain decoding the two have the same mean up to chance, over any number of tokens. A scheme that
prefers likely tokens has more of the first. That excess, in nats per token, says that the text has left the
distribution, and to which side. It is no distance: unlikely tokens, which a small epsilon accepts, reduce it again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.progress import track

from benchmarks import _bench_common as common
from benchmarks._bench_agreement import before_new
from benchmarks._bench_repetition import counted
from benchmarks._bench_runs import Runner, Scheme, Trace
from benchmarks._bench_schemes import acceptance
from benchmarks._bench_world import World, deal
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters import MedusaHeads
from decodax.decoding.strategies.medusa import within_depth
from decodax.decoding.training.distillation import window_logits
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers import ExactMatch, TypicalAcceptance
from decodax.models.load import LanguageModel
from decodax.models.model import Model, Params

PLAIN, EXACT = "plain decoding", "exact match"
OPEN_ROWS = 32  # one row in this many may diverge from plain decoding: float32 leaves one draw in 100,000 open, about


@dataclasses.dataclass(frozen=True)
class TypicalSetting:
    """The sizes of the runs, and the settings tried.

    num_new: tokens per row.
    capacity: of the buffers.
    batch: rows per batch.
    tree: tokens of a forward.
    epsilons: those of typical acceptance; its delta is their square root.
    """

    num_new: int
    capacity: int
    batch: int
    tree: int
    epsilons: tuple[float, ...]


def schemes(lm: LanguageModel, setting: TypicalSetting) -> Iterator[Scheme]:
    """Plain decoding, and one tree of the embedded model's Medusa heads under each verifier."""
    weights = find_auxiliary_weights("medusa", lm, None)
    tree = best_tree(within_depth(weights.rank_accuracy), setting.tree - 1)
    heads, drafter = weights.params["heads"], MedusaHeads(lm.model, tree)
    yield Scheme(PLAIN)
    yield Scheme(EXACT, drafter, ExactMatch(), heads, True)
    for epsilon in setting.epsilons:
        yield Scheme(f"epsilon {epsilon}", drafter, TypicalAcceptance(epsilon, epsilon**0.5), heads, True)


def measure(world: World, setting: TypicalSetting) -> dict[str, Any]:
    """Every scheme over all prompts at temperature 1.

    Raises SystemExit when the exact match gives other tokens than plain decoding.
    """
    lm, found = world.lm, {}
    batches = deal(world.prompts, setting.batch)
    plain = np.zeros((0, setting.num_new), np.int32)
    for scheme in track(list(schemes(lm, setting)), "typical acceptance", transient=True):
        runner = Runner(lm.model, lm.params, scheme, capacity=setting.capacity, num_new=setting.num_new)
        traces = [runner.trace(rows, 1.0) for rows in batches]
        new = np.concatenate([trace.new for trace in traces])
        plain = new if scheme.name == PLAIN else plain
        same_rows = int(np.sum(np.all(new == plain, axis=1)))
        if scheme.lossless and same_rows < len(new) - len(new) // OPEN_ROWS:
            raise SystemExit(f"{scheme.name} gives other tokens than plain decoding in {len(new) - same_rows} rows")
        whole, loop_free = (
            [counted(trace.new, trace.ends, without_loops=without) for trace in traces] for without in (False, True)
        )
        facts = acceptance(list(zip([trace.new for trace in traces], whole, loop_free, strict=True)))
        facts |= {"same_rows": same_rows, "lossless": scheme.lossless}
        found[scheme.name] = facts | under_the_distribution(lm.model, lm.params, traces)
    report(found)
    return {"setting": dataclasses.asdict(setting), "schemes": found}


def under_the_distribution(model: Model, params: Params, traces: Sequence[Trace]) -> dict[str, float]:
    """The new tokens under plain decoding's distribution at temperature 1, each after the text before it, in nats.

    probability: the mean chance that plain decoding would draw that very token there.
    log_probability: its mean logarithm.
    ..._if_drawn: the same of tokens drawn from that distribution at the same places.
    excess: the log probability above that.
    excess_error: its standard error, from the means of the rows.
    """
    pieces = []
    for trace in traces:
        values = np.asarray(_judged(model, params, trace.state.tokens), np.float64)
        pieces.append(np.take_along_axis(values, before_new(trace)[:, :, None], axis=1))
    values = np.concatenate(pieces)
    names = ("probability", "probability_if_drawn", "log_probability", "log_probability_if_drawn")
    excess = (values[:, :, 2] - values[:, :, 3]).mean(axis=1)
    error = excess.std(ddof=1) / len(excess) ** 0.5
    facts = dict(zip(names, values.mean(axis=(0, 1)).tolist(), strict=True))
    return facts | {"excess": float(excess.mean()), "excess_error": float(error)}


@partial(jax.jit, static_argnums=0)
def _judged(model: Model, params: Params, tokens: Int[Array, "B S"]) -> Float[Array, "B S_less_1 4"]:
    """After every token, of the one that follows: p, sum of p^2, ln p, sum of p ln p; row by row, to save memory."""

    def of_row(row: Int[Array, " S"]) -> Float[Array, "S_less_1 4"]:
        log_p = jax.nn.log_softmax(window_logits(model, params, row[None])[0, :-1].astype(jnp.float32))
        probs, written = jnp.exp(log_p), jnp.take_along_axis(log_p, row[1:, None], axis=1)[:, 0]
        return jnp.stack([jnp.exp(written), jnp.sum(probs * probs, 1), written, jnp.sum(probs * log_p, 1)], axis=1)

    return jax.lax.map(of_row, tokens)


def report(found: dict[str, dict[str, Any]]) -> None:
    keys = ("tokens_per_forward", "probability", "probability_if_drawn", "excess", "excess_error", "same_rows")
    rows = [[name, *(facts[key] for key in keys)] for name, facts in found.items()]
    columns = ["scheme", "per forward", "p", "if drawn", "excess", "error", "rows as plain"]
    common.print_table("Temperature 1", columns, rows)
