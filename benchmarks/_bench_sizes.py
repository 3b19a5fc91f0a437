"""Chooses tree sizes by a device's latency curve, and measures the gain of a loop of that size and acceptance.

The curve is L(N), the time of a forward over N tokens. With the accuracies that were published for Vicuna-7B it says
how many tokens parallel prompt decoding and Medusa should put into a forward. A replay drafter then decodes with as
many nodes and as many tokens per forward: it shows the gain in a real loop, without the model that such auxiliary
weights would have to be trained for.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import _bench_common as common
from benchmarks._bench_loop import replay
from benchmarks._bench_runs import Runner, Scheme, row_rounds
from decodax.decoding.draft_length import choose_tree_size, latency_curve
from decodax.decoding.prompt_tree import dynamic_trees, stationary_expected_tokens
from decodax.decoding.published_formats import PUBLISHED_ACCURACY
from decodax.decoding.strategies.medusa import within_depth
from decodax.decoding.tree_choice import best_tree, expected_tokens


@dataclasses.dataclass(frozen=True)
class SizeSetting:
    """The model and the timing.

    shape: of the model.
    sizes: tokens of a timed forward.
    prompt, new: tokens of a row.
    rounds: of the timing.
    """

    shape: common.Shape
    dtype: str
    sizes: tuple[int, ...]
    prompt: int
    new: int
    rounds: int


def measure(setting: SizeSetting) -> dict[str, Any]:
    model = setting.shape.model()
    params = common.random_params(model, seed=0, dtype=jnp.dtype(setting.dtype))
    seconds = latency_curve(model, params, (1, *setting.sizes))
    chosen, runners = {}, {}
    prompt = [np.random.default_rng(0).integers(0, setting.shape.vocab_size, setting.prompt).astype(np.int32)]
    size = {"capacity": setting.prompt + setting.new, "num_new": setting.new}
    runners["plain"] = Runner(model, params, Scheme("plain"), **size)
    text = np.concatenate([prompt[0], runners["plain"].finish(prompt)[0]])[None]
    for name, tokens in expected(setting.sizes).items():
        choice = choose_tree_size(seconds, tokens)
        chosen[name] = {"nodes": choice.num_tokens + 1, "expected_speed_up": choice.speed_up, "reason": choice.reason}
        if choice.num_tokens:
            acceptance = _acceptance(tokens[choice.num_tokens + 1], choice.num_tokens)
            scheme = replay(name, choice.num_tokens + 1, acceptance, text, model)
            runners[name] = Runner(model, params, scheme, **size)
            runners[name].compile(runners[name].begin(prompt))

    def run(name: str) -> dict[str, float]:
        elapsed, state = runners[name].seconds(runners[name].begin(prompt))
        per_forward = setting.new / row_rounds(state) if state.counts is not None else 1.0
        return {"seconds": elapsed, "tokens_per_forward": per_forward}

    measured = common.alternate({name: lambda name=name: run(name) for name in runners}, setting.rounds)
    for name in chosen:
        if name in measured:
            ratio = np.divide(measured["plain"]["seconds"], measured[name]["seconds"])
            chosen[name] |= {
                "replay_speed_up": common.summary(ratio.tolist()),
                "replay_tokens_per_forward": measured[name]["tokens_per_forward"][0],
            }
    common.print_table("L(N)", ["tokens", "ms"], [[size, 1e3 * value] for size, value in seconds.items()])
    rows = [
        [name, by["nodes"], by["expected_speed_up"], by.get("replay_speed_up", {}).get("median", "")]
        for name, by in chosen.items()
    ]
    common.print_table("Sizes that the curve implies", ["scheme", "nodes", "expected", "replayed"], rows)
    latency = {str(size): value for size, value in seconds.items()}
    return {"setting": dataclasses.asdict(setting), "latency_seconds": latency, "chosen": chosen}


def expected(sizes: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Tokens per forward by size, with the published accuracies."""
    table = [list(row) for row in PUBLISHED_ACCURACY]
    heads = within_depth(table)
    return {
        "ppd": {size: stationary_expected_tokens(table, dynamic_trees(table, size)) for size in sizes if size >= 6},
        "medusa": {size: expected_tokens(heads, best_tree(heads, size - 1)) for size in sizes if size > 1},
    }


def _acceptance(tokens: float, num_drafted: int) -> float:
    """The acceptance rate a of a chain with this many tokens per forward: 1 + a + ... + a^C, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(num_drafted + 1)) < tokens else (low, middle)
    return low
