"""Measures schemes with auxiliary weights, and layer policies that skip layers, on the embedded model.

For every setting of a scheme: tokens per forward, and tokens for as many layers as one forward through all of them,
with and without the rows' loops. Lossless ones must give plain decoding's tokens; of the others the agreement with it
is measured. Nothing is timed here: tokens and layers are counted.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import decodax
from benchmarks import _bench_common as common
from benchmarks._bench_agreement import Steps, compare, plain_steps, share_followed
from benchmarks._bench_repetition import last_rounds
from benchmarks._bench_runs import Runner, Scheme, Trace
from benchmarks._bench_world import World, deal
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters import EarlyLayers, MedusaHeads, NoDraft, PromptTokens
from decodax.decoding.early_exit.routed_layers import RoutedLayers
from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.early_exit.speculative_exit import SpeculativeExit
from decodax.decoding.prompt_tree import dynamic_trees, static_tree
from decodax.decoding.strategies import METHODS as STRATEGIES
from decodax.decoding.strategies import Speculation
from decodax.decoding.strategies.medusa import within_depth
from decodax.decoding.training.prompt_tokens import PromptTokensShape, initial_embedding
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers import ExactMatch
from decodax.models.load import LanguageModel

TARGETS = {"ppd": 1.8, "medusa": 1.7, "kangaroo, per full forward": 1.4, "del, per full forward": 1.4}


@dataclasses.dataclass(frozen=True)
class AuxiliarySetting:
    """The sizes of the runs, and the settings tried.

    num_new: tokens per row.
    capacity: of the buffers.
    batch: rows per batch.
    trees: tokens of a forward.
    wide_trees: more of them, for trained prompt tokens only, as wide as their paper's.
    confidences: of Kangaroo.
    exits, lengths: the grid beside DEL.
    thresholds: of the exit predictors and of the layer gates.
    min_layers: of SkipDecode.
    """

    num_new: int
    capacity: int
    batch: int
    trees: tuple[int, ...]
    wide_trees: tuple[int, ...]
    confidences: tuple[float, ...]
    exits: tuple[int, ...]
    lengths: tuple[int, ...]
    thresholds: tuple[float, ...]
    min_layers: tuple[int, ...]


def settings(
    lm: LanguageModel, skipping: LanguageModel, setting: AuxiliarySetting
) -> Iterator[tuple[str, Any, Scheme]]:
    """Name of the scheme, the setting tried, and the scheme with it."""
    yield from prompt_settings(lm, setting)
    yield from head_settings(lm, setting)
    kangaroo = built(lm, "kangaroo")
    for confidence in setting.confidences:
        yield "kangaroo", confidence, changed(kangaroo, confidence=confidence)
    for exit_layer in setting.exits:
        for length in setting.lengths:
            drafter = EarlyLayers(lm.model, exit_layer, length)
            yield "layer_skip", f"{exit_layer}, {length}", Scheme("", drafter, ExactMatch(), params=skipping.params)
    yield "layer_skip as chosen", 0, dataclasses.replace(built(skipping, "layer_skip"), params=skipping.params)
    yield "del", 0, dataclasses.replace(built(skipping, "del"), params=skipping.params)
    yield "draft_model", 4, built(lm, "draft_model", 4)
    yield "draft_ppd", 4, built(lm, "draft_ppd", 4)
    yield from policy_settings(lm, setting)


def prompt_settings(lm: LanguageModel, setting: AuxiliarySetting) -> Iterator[tuple[str, Any, Scheme]]:
    """Prompt tokens: dynamic and static trees of several sizes, and untrained ones."""
    weights = find_auxiliary_weights("ppd", lm, None)
    accuracy = weights.rank_accuracy
    untrained = {"embedding": initial_embedding(lm.params, lm.model, PromptTokensShape(**weights.shape), 0)}
    for size in (*setting.trees, *setting.wide_trees):
        if size < len(accuracy) + 3:
            continue
        drafter = PromptTokens(lm.model, dynamic_trees(accuracy, size))
        yield "ppd", size, Scheme("", drafter, ExactMatch(), weights.params, True)
        if size in setting.wide_trees:
            continue
        yield "ppd, untrained", size, Scheme("", drafter, ExactMatch(), untrained, True)
        candidates = (size - len(accuracy) - 1) // (len(accuracy) + 1)
        if candidates:
            static = PromptTokens(lm.model, (static_tree(accuracy, candidates),))
            yield "ppd, static tree", size, Scheme("", static, ExactMatch(), weights.params, True)


def head_settings(lm: LanguageModel, setting: AuxiliarySetting) -> Iterator[tuple[str, Any, Scheme]]:
    """Medusa heads with trees of several sizes."""
    weights = find_auxiliary_weights("medusa", lm, None)
    accuracy, heads = within_depth(weights.rank_accuracy), weights.params["heads"]
    for size in setting.trees:
        drafter = MedusaHeads(lm.model, best_tree(accuracy, size - 1))
        yield "medusa", size, Scheme("", drafter, ExactMatch(), heads, True)


def policy_settings(lm: LanguageModel, setting: AuxiliarySetting) -> Iterator[tuple[str, Any, Scheme]]:
    """Exits by predictors, alone and on a tree; SkipDecode; routed layers."""
    for name in ("specee", "specee_tree"):
        scheme = built(lm, name)
        policy = scheme.layer_policy
        assert isinstance(policy, SpeculativeExit)
        for threshold in setting.thresholds:
            changed_policy = dataclasses.replace(policy, threshold=threshold)
            yield name, threshold, dataclasses.replace(scheme, layer_policy=changed_policy)
    scheme, num_layers = built(lm, "skip_decode"), lm.config.num_layers
    for fewest in setting.min_layers:
        policy = SkipDecode(num_layers, fewest, setting.num_new)
        yield "skip_decode", fewest, dataclasses.replace(scheme, layer_policy=policy)
        yield "skip_decode, weights unchanged", fewest, Scheme("", NoDraft(), ExactMatch(), layer_policy=policy)
    scheme = built(lm, "first")
    policy = scheme.layer_policy
    assert isinstance(policy, RoutedLayers)
    for threshold in setting.thresholds:
        changed_policy = dataclasses.replace(policy, threshold=threshold)
        yield "first", threshold, dataclasses.replace(scheme, layer_policy=changed_policy)


def built(lm: LanguageModel, name: str, draft_tokens: int | None = None) -> Scheme:
    """A named strategy as `decodax.generate` builds it."""
    made = (STRATEGIES[name]() if draft_tokens is None else STRATEGIES[name](draft_tokens)).build(lm)
    assert isinstance(made, Speculation)
    trained = made.draft_params is not None
    return Scheme(name, made.drafter, made.verifier, made.draft_params, trained, made.layer_policy, made.params)


def changed(scheme: Scheme, **fields: Any) -> Scheme:
    assert scheme.drafter is not None
    return dataclasses.replace(scheme, drafter=dataclasses.replace(scheme.drafter, **fields))


def measure(world: World, setting: AuxiliarySetting) -> dict[str, Any]:
    """Every setting of every scheme over all prompts.

    Raises SystemExit when a lossless scheme gives other tokens than plain decoding.
    """
    lm, skipping = world.lm, decodax.load(dtype="float32", adapter="layer_skip")
    batches = deal(world.prompts, setting.batch)

    def runner(scheme: Scheme) -> Runner:
        return Runner(lm.model, lm.params, scheme, capacity=setting.capacity, num_new=setting.num_new)

    plain = {
        id(params): Steps.concatenated([plain_steps(runner(Scheme("plain", params=params)), rows) for rows in batches])
        for params in (lm.params, skipping.params)
    }
    found: dict[str, dict[str, Any]] = {}
    for name, value, scheme in track(list(settings(lm, skipping, setting)), "settings", transient=True):
        own = runner(scheme)
        traces = [own.trace(rows) for rows in batches]
        # A lossy scheme may change the weights, and is compared with the unchanged model.
        reference = plain.get(id(own.params), plain[id(lm.params)])
        agreement = compare(np.concatenate([trace.new for trace in traces]), reference)
        if scheme.lossless and not agreement.passes:
            raise SystemExit(f"{name} at {value} gives other tokens than plain decoding in {agreement.wrong_rows} rows")
        facts = summary(traces, lm.config.num_layers) | agreement.as_numbers() | {"lossless": scheme.lossless}
        facts["followed"] = 1.0 if scheme.lossless else share_followed(lm.model, lm.params, traces)
        found.setdefault(name, {})[str(value)] = facts
    report(found)
    return {"setting": dataclasses.asdict(setting), "targets": TARGETS, "schemes": found}


def summary(traces: Sequence[Trace], num_layers: int) -> dict[str, Any]:
    """Tokens per forward and per full forward, with and without loops; layers of the batch and those of its rows."""
    facts: dict[str, Any] = {}
    for label, without_loops in (("", False), ("_loop_free", True)):
        tokens = rounds = layers = 0
        for trace in traces:
            for row, end in enumerate(last_rounds(trace.new, trace.ends, without_loops=without_loops)):
                tokens, rounds = tokens + int(trace.ends[end, row]), rounds + end
                layers += int(trace.layers[end, row])
        facts[f"tokens_per_forward{label}"] = tokens / rounds
        facts[f"tokens_per_full_forward{label}"] = tokens * num_layers / layers
    batch = sum(int(trace.state.layer_counts.batch) for trace in traces)
    forwards = sum(len(trace.ends) - 1 for trace in traces)
    row_rounds = sum(int(np.sum(np.diff(trace.ends, axis=0) > 0)) for trace in traces)
    facts["layers_per_forward_of_the_batch"] = batch / forwards
    facts["layers_per_forward_of_a_row"] = sum(int(trace.layers[-1].sum()) for trace in traces) / row_rounds
    drafted = [trace.state.counts for trace in traces if trace.state.counts is not None]
    facts["draft_forwards"] = sum(int(counts.num_draft_forwards) for counts in drafted)
    return facts


def report(found: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, by_setting in found.items():
        for value, facts in by_setting.items():
            numbers = [
                facts[f"tokens_per_{unit}{label}"]
                for unit in ("forward", "full_forward")
                for label in ("", "_loop_free")
            ]
            layers = [facts[f"layers_per_forward_of_{whose}"] for whose in ("a_row", "the_batch")]
            rows.append([name, value, *numbers, *layers, facts["followed"], facts["same_tokens"]])
    columns = ["scheme", "setting", "per forward", "loop-free", "per full forward", "loop-free"]
    common.print_table("Tokens", [*columns, "layers, row", "batch", "followed", "as plain"], rows)
    best = max(facts["tokens_per_full_forward"] for facts in found["layer_skip"].values())
    own = found["del"]["0"]["tokens_per_full_forward"]
    Console().print(f"DEL reaches {own / best:.3f} of the best fixed exit and length")
