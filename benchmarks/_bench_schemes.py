"""Measures every scheme against plain decoding: the gate, acceptance, speed, memory and compile time of each.

Order matters: a scheme passes the gate before it is timed, and one that gives other greedy tokens than plain decoding
gets no speed. All that is timed alternates in one run. Tokens are counted alike: `num_new` per row, nothing
ends a row early.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import _bench_common as common
from benchmarks._bench_agreement import Agreement, Steps, compare, plain_steps
from benchmarks._bench_repetition import PerForward, counted, summed
from benchmarks._bench_runs import Batch, Runner, Scheme, row_rounds, tree_bytes
from benchmarks._bench_world import World, deal
from decodax.decoding.drafters import Drafter, DraftModel, PromptLookup
from decodax.decoding.strategies import METHODS as STRATEGIES
from decodax.decoding.strategies import Speculation, Strategy
from decodax.decoding.training.distillation import AcceptanceMeter
from decodax.decoding.verifiers import METHODS as VERIFIERS
from decodax.decoding.verifiers import Verifier
from decodax.models.load import LanguageModel

TARGETS = {"draft_model, greedy, tokens per forward": 2.0, "compile seconds, of plain decoding's": 1.5}
PLAIN = "autoregressive"
Traced = tuple[np.ndarray, PerForward, PerForward]  # new tokens, what the forwards gave, and the same without loops


@dataclasses.dataclass(frozen=True)
class SchemeSetting:
    """The sizes of the runs.

    num_new: tokens per row.
    capacity: of the buffers.
    batches: sizes that are timed.
    timed_rows: prompts per timing.
    sampled_rows: prompts traced at temperature 1 (greedy: all).
    rounds: of the timing.
    """

    num_new: int
    capacity: int
    batches: tuple[int, ...]
    timed_rows: dict[int, int]
    sampled_rows: int
    rounds: int
    temperatures: tuple[float, ...] = (0.0, 1.0)


def named_schemes(world: World) -> dict[str, Scheme]:
    """Plain decoding, and the named strategies without auxiliary weights or with a draft model, as in `generate`.

    Those with other auxiliary weights have a benchmark of their own (`_bench_auxiliary.py`).
    """
    found = {PLAIN: Scheme(PLAIN)}
    for name, strategy in STRATEGIES.items():
        if not (isinstance(strategy, type) and issubclass(strategy, Strategy)):
            continue
        if strategy.auxiliary_weights in (None, DraftModel.auxiliary_weights):
            draft = world.draft if strategy.auxiliary_weights is not None else None
            found[name] = _scheme(name, strategy().build(world.lm, draft))
    return found


def _scheme(name: str, built: Any) -> Scheme:
    if not isinstance(built, Speculation):
        raise SystemExit(f"{name} gave {type(built).__name__}, not a drafter with a verifier: nothing to measure")
    return Scheme(name, built.drafter, built.verifier, built.draft_params, built.draft_params is not None)


def all_schemes(world: World) -> dict[str, Scheme]:
    """The named ones, and pairs by hand, so that every verifier and every drafter but Replay is measured."""
    schemes = named_schemes(world)
    chain, tree = schemes["draft_model"], schemes["draft_tree"]
    assert isinstance(chain.drafter, DraftModel) and isinstance(tree.drafter, DraftModel)
    model, parents = chain.drafter.model, tree.drafter.parents
    lookup = schemes["prompt_lookup"].drafter
    independent = DraftModel.sampled(model, parents, replacement=True)
    pairs: list[tuple[str, Drafter | None, str]] = [
        ("lookup", lookup, "exact_match"),
        ("chain", chain.drafter, "exact_match"),
        ("chain", chain.drafter, "chain_rejection"),
        ("tree", tree.drafter, "exact_match"),
        ("tree", tree.drafter, "deterministic_tree"),
        ("tree, independent draws", independent, "tree_rejection"),
        ("tree, no repeats", DraftModel.sampled(model, parents), "tree_rejection_without_replacement"),
        ("chain", chain.drafter, "typical_acceptance"),
        ("tree", tree.drafter, "typical_acceptance"),
    ]
    known = {(scheme.drafter, scheme.verifier) for scheme in schemes.values()}
    for drafted, drafter, name in pairs:
        verifier: Verifier = VERIFIERS[name]()
        if (drafter, verifier) not in known:
            needs_draft = not isinstance(drafter, PromptLookup)
            params = chain.draft_params if needs_draft else None
            label = f"{drafted} + {name}"
            schemes[label] = Scheme(label, drafter, verifier, params, needs_draft)
    return schemes


def measure(world: World, setting: SchemeSetting, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """Gate and traces at the largest batch, then timing of what passed, at every batch size and temperature."""
    Console().print(f"{len(schemes)} schemes, {len(world.prompts)} prompts of {setting.num_new} new tokens")
    batch = max(setting.batches)
    batches = deal(world.prompts, batch)
    runners = {name: runner(world.lm, scheme, setting) for name, scheme in schemes.items()}
    plain = Steps.concatenated([plain_steps(runners[PLAIN], prompts) for prompts in busy(batches, "plain decoding")])
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting), "targets": TARGETS, "schemes": {}}
    agreements: dict[str, Agreement] = {}
    for name in busy(list(schemes), "gate and acceptance, greedy"):
        agreements[name], facts = judge(runners[name], batches, plain)
        result["schemes"][name] = describe(schemes[name], runners[name], batches[0]) | {"greedy": facts}
    red = [name for name, found in agreements.items() if schemes[name].lossless and not found.passes]
    for name in red:
        Console().print(f"[red]{name}: other greedy tokens than plain decoding, so it gets no speed[/red]")
    few = batches[: max(1, setting.sampled_rows // batch)]
    sampled = {name: runner(world.lm, scheme, setting) for name, scheme in schemes.items()}
    for name in busy(list(schemes), "acceptance at temperature 1"):
        result["schemes"][name]["temperature 1"] = acceptance(trace_all(sampled[name], few, 1.0))
    result["speed"] = {}
    for size in setting.batches:
        rows = deal(world.prompts[: setting.timed_rows[size]], size)
        for temperature in setting.temperatures:
            ready = {0.0: runners, 1.0: sampled}.get(temperature) if size == batch else None
            if ready is None:
                ready = {name: runner(world.lm, scheme, setting) for name, scheme in schemes.items()}
            if size == min(setting.batches) and not temperature:
                result["compile"] = compile_ratios(ready, rows[0])
            label = f"batch {size}, {f'temperature {temperature:g}' if temperature else 'greedy'}"
            timed = {name: one for name, one in ready.items() if name not in red}
            result["speed"][label] = speed(timed, rows, temperature, setting, label)
    result["gate"] = {name: {"passes": name not in red} | found.as_numbers() for name, found in agreements.items()}
    return result


def busy(items: list[Any], label: str) -> Any:
    return track(items, label, transient=True)


def runner(lm: LanguageModel, scheme: Scheme, setting: SchemeSetting) -> Runner:
    return Runner(lm.model, lm.params, scheme, capacity=setting.capacity, num_new=setting.num_new)


def trace_all(runner: Runner, batches: Sequence[Batch], temperature: float) -> list[Traced]:
    """Per batch: the new tokens, what a forward gave, and the same without loops."""
    found = []
    for prompts in batches:
        trace = runner.trace(prompts, temperature)
        whole = counted(trace.new, trace.ends, without_loops=False)
        if trace.state.counts is not None and whole.rounds != row_rounds(trace.state):
            raise SystemExit(
                f"{runner.scheme.name} must count {whole.rounds} rounds, as traced, got {row_rounds(trace.state)}"
            )
        found.append((trace.new, whole, counted(trace.new, trace.ends, without_loops=True)))
    return found


def acceptance(traced: list[Traced]) -> dict[str, Any]:
    """Tokens per target forward over all rows, and loop-free."""
    whole, loop_free = (summed([one[index] for one in traced]) for index in (1, 2))
    return {
        "tokens_per_forward": whole.tokens_per_forward,
        "tokens_per_forward_loop_free": loop_free.tokens_per_forward,
        "tokens": whole.tokens,
        "tokens_loop_free": loop_free.tokens,
        "looping_rows": whole.looping_rows,
        "rows": whole.rows,
    }


def judge(runner: Runner, batches: Sequence[Batch], plain: Steps) -> tuple[Agreement, dict[str, Any]]:
    """The gate for one scheme, and its acceptance in the same pass."""
    traced = trace_all(runner, batches, 0.0)
    return compare(np.concatenate([new for new, *_ in traced]), plain), acceptance(traced)


def describe(scheme: Scheme, runner: Runner, prompts: Batch) -> dict[str, Any]:
    """Memory beyond plain decoding's model and cache, in bytes for this batch, and the trained parameters."""
    held = runner.begin(prompts).draft
    trained = sum(leaf.size for leaf in jax.tree.leaves(scheme.draft_params)) if scheme.trained else 0
    params_bytes = tree_bytes(scheme.draft_params) if scheme.trained else 0
    return {
        "drafter": type(scheme.drafter).__name__ if scheme.drafter else None,
        "verifier": type(scheme.verifier).__name__ if scheme.verifier else None,
        "nodes": scheme.drafter.num_nodes if scheme.drafter else 1,
        "depth": scheme.drafter.max_depth if scheme.drafter else 0,
        "lossless": scheme.lossless,
        "trained_parameters": trained,
        "draft_params_bytes": params_bytes,
        "draft_state_bytes": tree_bytes(held),
        "draft_state_rows": len(prompts),
    }


def speed(
    runners: dict[str, Runner], batches: list[list[np.ndarray]], temperature: float, setting: SchemeSetting, label: str
) -> dict[str, Any]:
    """Tokens per second and speed-up of every scheme, alternating; compile seconds beside plain decoding's."""
    for name in busy(list(runners), f"{label}: compiling"):
        if not runners[name].ready:
            runners[name].compile(runners[name].begin(batches[0], temperature))

    def run(one: Runner) -> dict[str, float]:
        seconds = 0.0
        for prompts in batches:
            seconds += one.seconds(one.begin(prompts, temperature))[0]
        return {"tokens/s": sum(map(len, batches)) * setting.num_new / seconds}

    measured = common.alternate({name: lambda one=one: run(one) for name, one in runners.items()}, setting.rounds)
    found = {}
    for name, by in measured.items():
        ratios = [ours / plain for ours, plain in zip(by["tokens/s"], measured[PLAIN]["tokens/s"], strict=True)]
        found[name] = {
            "tokens_per_second": common.summary(by["tokens/s"]),
            "speed_up": common.summary(ratios),
            "compile_seconds": runners[name].compile_seconds,
        }
    return found


def compile_ratios(runners: dict[str, Runner], prompts: Batch) -> dict[str, dict[str, float]]:
    """Compile seconds of each greedy loop, and of plain decoding's compiled right before it."""
    plain, found = runners[PLAIN], {}
    for name in busy([name for name in runners if name != PLAIN], "compile times"):
        before = plain.compile(plain.begin(prompts))
        seconds = runners[name].compile(runners[name].begin(prompts))
        found[name] = {"seconds": seconds, "plain_seconds": before, "ratio": seconds / before}
    return found


def teacher_forced(world: World, scheme: Scheme) -> dict[str, Any]:
    """How often the draft's token would be accepted on held-out text, each position after the text itself."""
    assert isinstance(scheme.drafter, DraftModel)
    meter = AcceptanceMeter(world.lm.model, scheme.drafter.model)
    return dataclasses.asdict(meter(world.lm.params, scheme.draft_params, world.heldout, batch=4))
