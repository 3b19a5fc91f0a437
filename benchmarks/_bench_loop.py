"""Measures what the loop of draft and verification costs, with drafts that are recorded, so free, and right at a rate.

The recording is plain decoding's own output. A round of C nodes (C - 1 draft tokens) cannot be faster than the target's
forward over C tokens, so the speed-up is at most tokens-per-forward x L(1) / L(C), L(N) being the measured time of that
forward with its logits and the cache updates. The share of this bound that the real loop reaches is its efficiency; the
rest goes into choosing tokens, verifying, writing the cache and the loop's own bookkeeping, which L leaves out.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import _bench_common as common
from benchmarks._bench_runs import Runner, Scheme, row_rounds
from decodax.decoding.draft_length import forwards
from decodax.decoding.drafters import Recording, Replay
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model

TARGETS = {"efficiency": 0.9, "loop of one node, of plain decoding": 0.97}


@dataclasses.dataclass(frozen=True)
class LoopSetting:
    """The model and the timing.

    nodes: values of C.
    curve: sizes N of the latency curve.
    forwards: timed per round and size.
    """

    shape: common.Shape
    dtype: str
    prompt: int
    new: int
    rounds: int
    nodes: tuple[int, ...]
    acceptances: tuple[float, ...]
    curve: tuple[int, ...]
    forwards: int


def timed(call: Callable[[], Any], count: int) -> dict[str, float]:
    """The median of `count` calls."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return {"seconds": float(np.median(seconds))}


def measure(setting: LoopSetting) -> dict[str, Any]:
    """Gate, latency curve and loops, all alternating in one run."""
    model = setting.shape.model()
    params = common.random_params(model, seed=0, dtype=jnp.dtype(setting.dtype))
    prompt = [np.random.default_rng(0).integers(0, setting.shape.vocab_size, setting.prompt).astype(np.int32)]
    size = {"capacity": setting.prompt + setting.new, "num_new": setting.new}
    plain = Runner(model, params, Scheme("plain"), **size)
    expected = plain.finish(prompt)
    runners = {"plain": plain}
    for nodes in setting.nodes:
        for acceptance in setting.acceptances if nodes > 1 else (1.0,):
            name = f"C = {nodes}, {acceptance:.0%} right"
            scheme = replay(name, nodes, acceptance, np.concatenate([prompt[0], expected[0]])[None], model)
            runners[name] = Runner(model, params, scheme, **size)
            # One program serves all rates of one length, as the recording is an argument.
            same = next((r for r in runners.values() if r.scheme.drafter == scheme.drafter and r.ready), None)
            if same is not None:
                runners[name].share(same)
            else:
                runners[name].decode(runners[name].begin(prompt))
    gate = check(runners, prompt, expected, setting.dtype)
    half = plain.decode(plain.begin(prompt), setting.new // 2)
    cached = setting.prompt + setting.new // 2 - 1
    curve = forwards(model, params, half.caches, cached, sorted({*setting.curve, *setting.nodes}))
    rounds_of: dict[str, int] = {}

    def run(name: str) -> dict[str, float]:
        seconds, state = runners[name].seconds(runners[name].begin(prompt))
        if state.counts is not None:
            rounds_of[name] = row_rounds(state)
        return {"seconds": seconds}

    contestants = {name: lambda name=name: run(name) for name in runners}
    contestants |= {f"L({size})": lambda call=call: timed(call, setting.forwards) for size, call in curve.items()}
    measured = common.summarise(common.alternate(contestants, setting.rounds))
    return report(measured, rounds_of, setting) | {"gate": gate, "measured": measured}


def replay(name: str, nodes: int, acceptance: float, recorded: np.ndarray, model: Model) -> Scheme:
    recording = Recording.create(recorded, wrong_rate=1 - acceptance, seed=1)
    return Scheme(name, Replay(nodes - 1, model.config.vocab_size), ExactMatch(), recording)


def check(runners: dict[str, Runner], prompt: list[np.ndarray], expected: np.ndarray, dtype: str) -> dict[str, Any]:
    """The gate: every loop gives plain decoding's tokens. In a lower precision, how far they agree is reported."""
    Console().print(f"correctness gate: {expected.shape[1]} greedy tokens of {len(runners)} loops")
    same = {}
    for name, runner in runners.items():
        got = runner.finish(prompt)
        if dtype == "float32":
            common.require_equal_tokens(name, got, expected)
        differs = np.flatnonzero(got[0] != expected[0])
        same[name] = int(differs[0]) if differs.size else expected.shape[1]
    return {"tokens": expected.shape[1], "same_tokens": same}


def report(measured: dict[str, Any], rounds_of: dict[str, int], setting: LoopSetting) -> dict[str, Any]:
    """Speed-ups beside their bounds, as a table and as the result; ratios are of medians."""
    second = {name: by["seconds"]["median"] for name, by in measured.items()}
    rows, loops = [], {}
    for name, num_rounds in rounds_of.items():
        nodes = int(name.removeprefix("C = ").split(",")[0])
        per_forward = setting.new / num_rounds
        bound = per_forward * second["L(1)"] / second[f"L({nodes})"]
        speed_up = second["plain"] / second[name]
        spread = [second["plain"] / measured[name]["seconds"][end] for end in ("max", "min")]
        loops[name] = {
            "nodes": nodes,
            "tokens_per_forward": per_forward,
            "tokens_per_second": setting.new / second[name],
            "speed_up": {"median": speed_up, "min": spread[0], "max": spread[1]},
            "bound": bound,
            "efficiency": speed_up / bound,
        }
        rows.append([name, per_forward, setting.new / second[name], speed_up, bound, speed_up / bound])
    columns = ["loop", "tokens per forward", "tokens/s", "speed-up", "bound", "of the bound"]
    plain = setting.new / second["plain"]
    common.print_table(f"Replay drafter; plain decoding {plain:.1f} tokens/s", columns, rows)
    curve = {size: second[f"L({size})"] for size in sorted({*setting.curve, *setting.nodes})}
    return {
        "setting": dataclasses.asdict(setting),
        "targets": TARGETS,
        "latency_seconds": {str(size): seconds for size, seconds in curve.items()},
        "plain_step_over_forward": second["plain"] / setting.new / second["L(1)"],
        "loops": loops,
    }
