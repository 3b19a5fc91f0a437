"""Measures the gain of every decoding scheme over plain decoding: tokens per forward, speed, memory, compile time.

    python -m benchmarks.bench_decoding                       # all parts, about half an hour on two cores
    python -m benchmarks.bench_decoding --part loop           # one part; the others stay in the result file
    python -m benchmarks.bench_decoding --quick --draft FOLDER

- `schemes`: the embedded model on prompts held out from all training. First the gate: a lossless scheme must give plain
  decoding's greedy tokens (float32, highest precision; ties of the two best logits within 1e-5 are counted), or it gets
  no speed. Then tokens per target forward (`_bench_repetition.py` says what is left out as a loop), tokens per
  second, memory, and compile time, batch 1 and 8, greedy and at temperature 1.
- `trees`: trees and chains of equal size.
- `loop`: what the loop itself costs, on a larger model with random weights and a drafter that costs nothing. On a GPU
  it uses the 8-billion shape in bfloat16 by itself.
- `length`: the draft length that `draft_tokens="auto"` chooses, and the times that decide it.
- `parts`: schemes with auxiliary weights (prompt tokens, Medusa heads, early exits) and layer policies that skip
  layers, each over its settings: tokens per forward and per full forward.
- `typical`: typical acceptance at temperature 1, where it is not lossless: tokens per forward, and how likely the
  tokens written are under plain decoding.
- `exits`: how often the head predicts the final token after each layer, for the unchanged model and its LayerSkip
  change.
- `depth`: time per step with half of the layers skipped, on the model of the `loop` part.
- `sizes`: the latency curve up to 256 tokens per forward, the tree sizes that it implies for prompt tokens and Medusa
  heads, and what a replay of that size and acceptance gains. On a GPU it uses the 8-billion shape, too.
- `bfloat16`: how often a scheme diverges from plain decoding in bfloat16, and whether rounding explains it.

Each part says when, on what and with which versions it ran. Compiled programs are not kept between runs, so that
compile times are real.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks import _bench_auxiliary as auxiliary
from benchmarks import _bench_auxiliary_pictures as auxiliary_pictures
from benchmarks import _bench_common as common
from benchmarks import _bench_exits as exits
from benchmarks import _bench_layer_policy as layer_policy
from benchmarks import _bench_loop as loop
from benchmarks import _bench_pictures as pictures
from benchmarks import _bench_precision as precision
from benchmarks import _bench_schemes as schemes
from benchmarks import _bench_sizes as sizes
from benchmarks import _bench_trees as trees
from benchmarks import _bench_typical as typical
from benchmarks._bench_world import World, embedded
from benchmarks.bench_decode import SHAPES
from benchmarks.bench_gpu import SHAPES as GPU_SHAPES
from decodax.decoding.draft_length import choose_for
from decodax.decoding.find_draft import find_draft
from decodax.models.load import LanguageModel

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


@dataclasses.dataclass(frozen=True)
class Size:
    """The settings of all parts.

    max_prompt, window_tokens: tokens of the longest prompt and of each held-out window.
    """

    num_prompts: int
    max_prompt: int
    num_windows: int
    window_tokens: int
    schemes: schemes.SchemeSetting
    trees: trees.TreeSetting
    loop: loop.LoopSetting
    bfloat16: precision.PrecisionSetting
    auxiliary: auxiliary.AuxiliarySetting
    typical: typical.TypicalSetting
    layer_policy: layer_policy.PolicySetting
    sizes: sizes.SizeSetting


FULL = Size(
    64,
    192,
    32,
    512,
    schemes.SchemeSetting(128, 320, (1, 8), {1: 3, 8: 8}, 32, 5),
    trees.TreeSetting((4, 8, 16), 32, 8, 128, 320, 32),
    loop.LoopSetting(
        SHAPES["full"],
        "float32",
        prompt=24,
        new=128,
        rounds=7,
        nodes=(1, 2, 3, 5, 9),
        acceptances=(1.0, 0.8, 0.6),
        curve=(1, 2, 3, 4, 5, 6, 8, 9, 12, 16),
        forwards=8,
    ),
    precision.PrecisionSetting(16, 8, 64, 256, 3),
    auxiliary.AuxiliarySetting(
        128,
        320,
        32,
        trees=(9, 16, 24, 48),
        wide_trees=(96, 288),
        confidences=(0.2, 0.4, 0.6, 0.8),
        exits=(1, 2, 4, 6),
        lengths=(1, 2, 4),
        thresholds=(0.3, 0.5, 0.7, 0.9),
        min_layers=(2, 4, 6, 8),
    ),
    typical.TypicalSetting(128, 320, 32, tree=24, epsilons=(0.3, 0.09, 0.03)),
    layer_policy.PolicySetting(SHAPES["full"], "float32", prompt=24, new=64, batches=(1, 8), rounds=7),
    sizes.SizeSetting(SHAPES["full"], "float32", (2, 4, 8, 16, 32, 64, 128, 256), prompt=24, new=256, rounds=5),
)
QUICK = Size(
    4,
    24,
    2,
    64,
    schemes.SchemeSetting(8, 32, (2,), {2: 2}, 2, 1),
    trees.TreeSetting((3,), 2, 2, 8, 32, 2),
    loop.LoopSetting(SHAPES["tiny"], "float32", 5, 11, 1, (1, 3), (1.0, 0.6), (1, 2, 3), 2),
    precision.PrecisionSetting(2, 2, 6, 32, 1),
    auxiliary.AuxiliarySetting(8, 40, 2, (6,), (10,), (0.6,), (2,), (2,), (0.5, 1.0), (4,)),
    typical.TypicalSetting(8, 40, 2, 6, (0.09,)),
    layer_policy.PolicySetting(SHAPES["tiny"], "float32", 5, 6, (2,), 1),
    sizes.SizeSetting(SHAPES["tiny"], "float32", (2, 8), 5, 9, 1),
)
ON_GPU = {"shape": GPU_SHAPES["8b"], "dtype": "bfloat16", "prompt": 128}


def for_device(setting: Any, size: Size) -> Any:
    """The setting of a part with random weights: on a GPU those of the 8-billion shape."""
    return dataclasses.replace(setting, **ON_GPU) if jax.default_backend() != "cpu" and size is FULL else setting


def run_schemes(world: World, size: Size) -> dict[str, Any]:
    found = schemes.all_schemes(world)
    result = schemes.measure(world, size.schemes, found)
    result["teacher_forced"] = schemes.teacher_forced(world, found["draft_model"])
    print_schemes(result)
    return result


def print_schemes(result: dict[str, Any]) -> None:
    """Prints tables: tokens per forward, memory and compile time, and speed at each batch size and temperature."""
    rows, costs = [], []
    for name, facts in result["schemes"].items():
        gate, compiled = result["gate"][name], result["compile"].get(name)
        verdict = f"{gate['same_rows']}/{gate['rows']}" + (f", {gate['ties']} ties" if gate["ties"] else "")
        verdict += "" if facts["lossless"] else " (lossy)"
        numbers = [
            facts[mode][key]
            for mode in ("greedy", "temperature 1")
            for key in ("tokens_per_forward", "tokens_per_forward_loop_free")
        ]
        rows.append([name, verdict if gate["passes"] else f"[red]{verdict}[/red]", *numbers])
        memory = [facts[key] / 1e6 for key in ("draft_params_bytes", "draft_state_bytes")]
        times = [compiled["seconds"], compiled["ratio"]] if compiled else ["", ""]
        costs.append([name, facts["trained_parameters"], *memory, *times])
    columns = ["scheme", "rows as plain", "greedy", "loop-free", "temp. 1", "loop-free"]
    common.print_table("Tokens per forward of the target", columns, rows)
    columns = ["scheme", "trained", "draft MB", "its state, MB", "compile s", "of plain's"]
    common.print_table("Memory and compile time", columns, costs)
    for label, by_name in result["speed"].items():
        rows = []
        for name, by in by_name.items():
            up = by["speed_up"]
            spread = f"{up['min']:.2f} to {up['max']:.2f}"
            rows.append([name, by["tokens_per_second"]["median"], up["median"], spread])
        common.print_table(label, ["scheme", "tokens/s", "speed-up", "lowest to highest"], rows)


def run_trees(world: World, size: Size) -> dict[str, Any]:
    return trees.measure(world, size.trees, schemes.named_schemes(world)["draft_model"])


def run_loop(world: World | None, size: Size) -> dict[str, Any]:
    return loop.measure(for_device(size.loop, size))


def run_auxiliary(world: World, size: Size) -> dict[str, Any]:
    return auxiliary.measure(world, size.auxiliary)


def run_typical(world: World, size: Size) -> dict[str, Any]:
    return typical.measure(world, size.typical)


def run_exits(world: World, size: Size) -> dict[str, Any]:
    return exits.measure(world)


def run_layer_policy(world: World | None, size: Size) -> dict[str, Any]:
    return layer_policy.measure(for_device(size.layer_policy, size))


def run_sizes(world: World | None, size: Size) -> dict[str, Any]:
    return sizes.measure(for_device(size.sizes, size))


def run_bfloat16(world: World, size: Size) -> dict[str, Any]:
    def rounded(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    found = {
        name: dataclasses.replace(scheme, draft_params=rounded(scheme.draft_params))
        for name, scheme in schemes.named_schemes(world).items()
    }
    lm: LanguageModel = dataclasses.replace(world.lm, params=rounded(world.lm.params))
    return precision.measure(lm, world.prompts, size.bfloat16, found)


def run_length(world: World, size: Size) -> dict[str, Any]:
    """The choice of `draft_tokens="auto"` for the embedded model here."""
    choice = choose_for(world.lm, find_draft("draft_model", world.lm, world.draft))
    Console().print(f"draft {choice.num_tokens} tokens, expecting {choice.speed_up:.2f}x: {choice.reason}")
    return dataclasses.asdict(choice)


PARTS: dict[str, Callable[[Any, Size], dict[str, Any]]] = {
    "schemes": run_schemes,
    "trees": run_trees,
    "loop": run_loop,
    "length": run_length,
    "parts": run_auxiliary,
    "typical": run_typical,
    "exits": run_exits,
    "depth": run_layer_policy,
    "sizes": run_sizes,
    "bfloat16": run_bfloat16,
}
PICTURES: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "schemes": ("bench_decoding.png", pictures.draw_schemes),
    "trees": ("bench_trees.png", pictures.draw_trees),
    "loop": ("latency_curve.png", pictures.draw_latency),
    "parts": ("bench_parts.png", auxiliary_pictures.draw_auxiliary),
}


def run(names: list[str], world: World | None, size: Size, output: Path, images: Path) -> dict[str, Any]:
    """Runs the parts and writes the result after each, beside what the file holds of other parts."""
    result = json.loads(output.read_text()) if output.exists() else {}
    for name in names:
        Console().rule(name)
        result[name] = common.machine() | PARTS[name](world, size)
        common.write_json(output, result)
        if name in PICTURES:
            file, draw = PICTURES[name]
            draw(result[name], images / file)
            Console().print(f"wrote {images / file}", soft_wrap=True)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, to see that it works")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this part (default: all)")
    parser.add_argument("--draft", type=Path, help="the draft's folder (default: the embedded model's own)")
    parser.add_argument("--rounds", type=int, help="rounds of every timing after the warm-up")
    parser.add_argument("--output", type=Path, help="default: results/bench_decoding_<cpu or device>.json")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: docs/images)")
    options = parser.parse_args(arguments)
    if options.quick and not (options.output and options.images):
        parser.error("--quick measures nothing worth keeping: say with --output and --images where to write it")
    size = QUICK if options.quick else FULL
    if options.rounds:
        timed = {
            part.name: dataclasses.replace(getattr(size, part.name), rounds=options.rounds)
            for part in dataclasses.fields(size)
            if hasattr(getattr(size, part.name), "rounds")
        }
        size = dataclasses.replace(size, **timed)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_default_matmul_precision", "highest")
    names = options.part or list(PARTS)
    world = None
    if not set(names) <= {"loop", "depth", "sizes"}:
        world = embedded(
            options.draft,
            num_prompts=size.num_prompts,
            max_prompt=size.max_prompt,
            num_windows=size.num_windows,
            window_tokens=size.window_tokens,
        )
    run(names, world, size, options.output or default_output(), options.images or IMAGES)


def default_output() -> Path:
    return common.RESULTS / f"bench_decoding_{jax.default_backend()}.json"


if __name__ == "__main__":
    main()
