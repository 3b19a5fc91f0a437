"""Typical acceptance at temperature 1, where it is not lossless: what it gains, and how far it leaves the model's law.

Greedily typical acceptance is exact, so only drawn text can show what it does. Medusa's heads draft one tree for all:
with the exact match, which writes plain decoding's tokens with the same random numbers, and with typical acceptance.

**How far it leaves the law.** Drawn texts part by chance, so tokens are not compared one by one. Instead the law p that
plain decoding draws from is looked up after the very text that a scheme has written, and asked two things: how likely
the token x written next is, ln p(x), and how likely one drawn from p is on average, sum over v of p(v) ln p(v). For
plain decoding the two have the same mean up to chance, over any number of tokens. A scheme that prefers likely tokens
has more of the first. That excess, in nats per token, says that the law has been left, and to which side. It is no
distance: unlikely tokens, which a small epsilon lets pass, bring it down again.
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

from decodax.decoding.drafters import MedusaHeads
from decodax.decoding.strategies.medusa import within_depth
from decodax.decoding.trained_part import find_part
from decodax.decoding.training.distillation import window_logits
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers import ExactMatch, TypicalAcceptance
from decodax.models.load import LanguageModel
from decodax.models.model import Model, Params
from decodax.scripts import _bench_common as common
from decodax.scripts._bench_agreement import before_new
from decodax.scripts._bench_repetition import counted
from decodax.scripts._bench_runs import Runner, Scheme, Trace
from decodax.scripts._bench_schemes import acceptance
from decodax.scripts._bench_world import World, deal

PLAIN, EXACT = "plain decoding", "exact match"
OPEN_ROWS = 32  # of so many rows one may part from plain decoding: float32 leaves about one draw in 100,000 open


@dataclasses.dataclass(frozen=True)
class TypicalSetting:
    """num_new: tokens per row. capacity: of the buffers. batch: rows at once. tree: tokens of a forward.

    epsilons: those of typical acceptance; its delta is their square root.
    """

    num_new: int
    capacity: int
    batch: int
    tree: int
    epsilons: tuple[float, ...]


def schemes(lm: LanguageModel, setting: TypicalSetting) -> Iterator[Scheme]:
    """Plain decoding, and one tree of the embedded model's Medusa heads under each verifier."""
    part = find_part("medusa", lm, None)
    tree = best_tree(within_depth(part.rank_accuracy), setting.tree - 1)
    heads, drafter = part.params["heads"], MedusaHeads(lm.model, tree)
    yield Scheme(PLAIN)
    yield Scheme(EXACT, drafter, ExactMatch(), heads, True)
    for epsilon in setting.epsilons:
        yield Scheme(f"epsilon {epsilon}", drafter, TypicalAcceptance(epsilon, epsilon**0.5), heads, True)


def measure(world: World, setting: TypicalSetting) -> dict[str, Any]:
    """Every scheme over all prompts at temperature 1. Raises SystemExit where the exact match is none."""
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
        found[scheme.name] = facts | under_the_law(lm.model, lm.params, traces)
    report(found)
    return {"setting": dataclasses.asdict(setting), "schemes": found}


def under_the_law(model: Model, params: Params, traces: Sequence[Trace]) -> dict[str, float]:
    """What plain decoding's law at temperature 1 says of the new tokens, each after the text before it; nats per token.

    probability: the mean chance that plain decoding would draw that very token there. log_probability: its mean
    logarithm. `_if_drawn`: the same of tokens drawn from that law at the same places. excess: the log probability above
    that. excess_error: its standard error, from the means of the rows.
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
        law, written = jnp.exp(log_p), jnp.take_along_axis(log_p, row[1:, None], axis=1)[:, 0]
        return jnp.stack([jnp.exp(written), jnp.sum(law * law, 1), written, jnp.sum(law * log_p, 1)], axis=1)

    return jax.lax.map(of_row, tokens)


def report(found: dict[str, dict[str, Any]]) -> None:
    keys = ("tokens_per_forward", "probability", "probability_if_drawn", "excess", "excess_error", "same_rows")
    rows = [[name, *(facts[key] for key in keys)] for name, facts in found.items()]
    columns = ["scheme", "per forward", "p", "if drawn", "excess", "error", "rows as plain"]
    common.print_table("Temperature 1", columns, rows)
