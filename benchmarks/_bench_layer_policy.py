"""Times steps with half of the layers skipped beside steps with all layers: skipped layers should take no time.

Half of the layers are skipped by a schedule that only the loop knows (each of them is in a `lax.cond`), on a larger
model with random weights. Plain decoding and the same loop with all its layers alternate with it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import _bench_common as common
from benchmarks._bench_runs import Runner, Scheme
from decodax.decoding.drafters import NoDraft
from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.verifiers import ExactMatch

TARGET = 0.65


@dataclasses.dataclass(frozen=True)
class PolicySetting:
    """The model and the timing.

    shape: of the model.
    prompt, new: tokens of each row.
    batches: batch sizes.
    rounds: of the timing.
    """

    shape: Any
    dtype: str
    prompt: int
    new: int
    batches: tuple[int, ...]
    rounds: int


def measure(setting: PolicySetting) -> dict[str, Any]:
    """Seconds per step by layer policy and batch size, and their ratios; the counts of layers are checked first."""
    model = setting.shape.model()
    params = common.random_params(model, 0, jnp.dtype(setting.dtype))
    num_layers = model.config.num_layers
    half = num_layers // 2
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting), "target": TARGET, "layers": [half, num_layers]}
    schemes = {
        "plain decoding": Scheme("plain"),
        "all layers": Scheme("all", NoDraft(), ExactMatch(), layer_policy=SkipDecode(num_layers, num_layers, 1, 0)),
        "half the layers": Scheme("half", NoDraft(), ExactMatch(), layer_policy=SkipDecode(num_layers, half, 1, 0)),
    }
    for batch in setting.batches:
        draw = np.random.default_rng(0)
        prompts = [draw.integers(0, model.config.vocab_size, setting.prompt).astype(np.int32) for _ in range(batch)]
        runners = {
            name: Runner(model, params, scheme, capacity=setting.prompt + setting.new + 8, num_new=setting.new)
            for name, scheme in schemes.items()
        }
        expected = {"plain decoding": num_layers, "all layers": num_layers, "half the layers": half}
        for name, runner in runners.items():
            state = runner.decode(runner.begin(prompts))
            # The first new token still runs all layers.
            num_run = expected[name] * (setting.new - 1) + num_layers
            if int(state.layer_counts.batch) != num_run:
                raise SystemExit(f"{name} must run {num_run} layers, got {int(state.layer_counts.batch)}")

        def run(runner: Runner, prompts: Any = prompts) -> dict[str, float]:
            return {"seconds": runner.seconds(runner.begin(prompts))[0] / setting.new}

        measured = common.alternate(
            {name: lambda runner=runner: run(runner) for name, runner in runners.items()}, setting.rounds
        )
        seconds = {name: by["seconds"] for name, by in measured.items()}
        ratios = {
            f"{name} / all layers": common.summary(np.divide(seconds[name], seconds["all layers"]).tolist())
            for name in ("plain decoding", "half the layers")
        }
        result[f"batch {batch}"] = {name: common.summary(values) for name, values in seconds.items()} | ratios
        rows = [[name, 1e3 * float(np.median(values))] for name, values in seconds.items()]
        rows += [[name, by["median"]] for name, by in ratios.items()]
        common.print_table(f"batch {batch}", ["layer policy", "ms per step, or ratio"], rows)
    return result
