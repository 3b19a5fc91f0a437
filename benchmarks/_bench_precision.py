"""Measures how often a scheme diverges from plain decoding in bfloat16, and whether rounding explains each divergence.

A forward over several tokens and one over a single token round differently, so where two tokens are almost equally
likely the choice may differ. The divergence rate is the share of rows that diverge from plain decoding; at each first
difference plain decoding's gap of the two best logits has to be below the bound of `_bench_agreement.py`. In the
invariant mode (`invariant=True` of `decodax.load`) both forwards give the same bits, so no row may diverge; the cost of
that is measured on plain decoding.
"""

import dataclasses
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import _bench_common as common
from benchmarks._bench_agreement import Agreement, Steps, compare, plain_steps
from benchmarks._bench_runs import Runner, Scheme
from benchmarks._bench_schemes import PLAIN, busy
from benchmarks._bench_world import deal
from decodax.models.load import LanguageModel
from decodax.models.model import Model


@dataclasses.dataclass(frozen=True)
class PrecisionSetting:
    rows: int
    batch: int
    num_new: int
    capacity: int
    rounds: int


def measure(
    lm: LanguageModel, prompts: list[np.ndarray], setting: PrecisionSetting, schemes: dict[str, Scheme]
) -> dict[str, Any]:
    """Measures greedy decoding, where a row's text has a right answer.

    lm, schemes: with their weights in bfloat16.
    """
    batches = deal(prompts[: setting.rows], setting.batch)
    lossless = {name: scheme for name, scheme in schemes.items() if scheme.lossless and name != PLAIN}
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting)}
    modes = {"as it is": lm.model, "invariant": dataclasses.replace(lm.model, invariant=True)}
    for mode, model in modes.items():
        Console().print(f"bfloat16, {mode}: {len(lossless)} schemes, {len(batches) * setting.batch} rows")
        result[mode] = divergence(lm, model, batches, setting, lossless)
    plain = {mode: runner(lm, model, Scheme(PLAIN), setting) for mode, model in modes.items()}

    def speed(one: Runner) -> dict[str, float]:
        seconds, _ = one.seconds(one.begin(batches[0]))
        return {"tokens/s": setting.batch * setting.num_new / seconds}

    contestants = {mode: lambda one=one: speed(one) for mode, one in plain.items()}
    result["plain_speed"] = common.summarise(common.alternate(contestants, setting.rounds))
    return result


def runner(lm: LanguageModel, model: Model, scheme: Scheme, setting: PrecisionSetting) -> Runner:
    return Runner(model, lm.params, scheme, capacity=setting.capacity, num_new=setting.num_new)


def divergence(
    lm: LanguageModel,
    model: Model,
    batches: list[list[np.ndarray]],
    setting: PrecisionSetting,
    schemes: dict[str, Scheme],
) -> dict[str, Any]:
    """Rows that diverge from plain decoding, and the gaps where they do, beside the bound."""
    one = runner(lm, model, Scheme(PLAIN), setting)
    plain = Steps.concatenated([plain_steps(one, prompts) for prompts in busy(batches, "plain decoding")])
    below = float(np.mean(plain.gap <= plain.bound))
    found, rows = {}, []
    for name in busy(list(schemes), "schemes"):
        one = runner(lm, model, schemes[name], setting)
        agreement = compare(np.concatenate([one.finish(prompts) for prompts in batches]), plain)
        found[name] = facts(agreement)
        keys = ("divergence_rate", "largest_gap", "largest_gap_of_bound", "largest_gap_in_spreads")
        rows.append([name, *(found[name][key] for key in keys)])
    columns = ["", "rows that diverge", "largest gap there", "of the bound", "in spreads"]
    common.print_table(f"bfloat16: {below:.1%} of all steps have a gap below the bound", columns, rows)
    return {
        "steps_below_bound": below,
        "median_gap": float(np.median(plain.gap)),
        "median_bound": float(np.median(plain.bound)),
        "median_spread": float(np.median(plain.spread)),
        "all_within_bound": all(one["within_bound"] for one in found.values()),
        "schemes": found,
    }


def facts(agreement: Agreement) -> dict[str, Any]:
    places = list(zip(agreement.gaps, agreement.bounds, agreement.spreads, strict=True))
    return {
        "rows": agreement.rows,
        "divergence_rate": 1 - agreement.same_rows / agreement.rows,
        "same_tokens": agreement.same_tokens,
        "within_bound": agreement.within_bound,
        "largest_gap": max(agreement.gaps, default=0.0),
        "largest_gap_of_bound": max((gap / bound for gap, bound, _ in places), default=0.0),
        "largest_gap_in_spreads": max((gap / spread for gap, _, spread in places), default=0.0),
        "gaps": agreement.gaps,
        "bounds": agreement.bounds,
        "spreads": agreement.spreads,
    }
