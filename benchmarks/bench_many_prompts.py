"""Measures how well a refilled batch is filled: rows of very different lengths against rows of equal ones.

    python -m benchmarks.bench_many_prompts

The same random prompts are continued by the same number of tokens in all: once all rows alike, once from 8 to 256 each,
as `generate(batch_size=)` runs them. First, rows of both have to have the tokens that they have alone. Then the two
alternate, and medians are compared, without and with the time of reading prompts.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

import decodax
from benchmarks import _bench_common as common
from benchmarks.bench_decode import SHAPES
from decodax.decoding.options import GenerateOptions
from decodax.decoding.refilled import FinishedRow, RefilledBatch, Settings
from decodax.models.load import LanguageModel

TARGET = 0.85  # of the tokens per second of equal rows


@dataclasses.dataclass(frozen=True)
class Setting:
    num_prompts: int
    batch: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    rounds: int


SETTINGS = {"full": Setting(64, 16, (8, 64), (8, 256), 3), "tiny": Setting(5, 2, (3, 9), (2, 9), 1)}


def run(lm: LanguageModel, prompts: list[np.ndarray], new: np.ndarray, batch: int) -> tuple[list[FinishedRow], Any]:
    """All rows, and the statistics."""
    options = GenerateOptions(batch_size=batch)
    settings = Settings(np.zeros(len(new), np.uint32), options.sampling(len(new), lm.config.vocab_size, ()), (), new)
    refilled = RefilledBatch(lm, prompts, options, settings)
    rows = sorted(refilled.run(), key=lambda row: row.index)
    return rows, refilled.stats(sum(map(len, prompts)), [(len(row.tokens), 0) for row in rows])


def measured(lm: LanguageModel, prompts: list[np.ndarray], new: np.ndarray, batch: int) -> dict[str, float]:
    begin = time.perf_counter()
    _, stats = run(lm, prompts, new, batch)
    return {
        "decode tokens/s": stats.tokens_per_second,
        "tokens/s with prompts": stats.num_new_tokens / (stats.decode_seconds + stats.prefill_seconds),
        "prefill seconds": stats.prefill_seconds,
        "forwards": stats.target_forwards,
        "prefill forwards": stats.prefill_forwards,
        "wall seconds": time.perf_counter() - begin,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="full")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "bench_many_prompts_cpu.json")
    options = parser.parse_args(arguments)
    setting, shape, random = SETTINGS[options.size], SHAPES[options.size], np.random.default_rng(0)
    model = shape.model()
    lm = LanguageModel(model, model.config, common.random_params(model, seed=0), None, Path("random"), ())
    sizes = random.integers(setting.prompt_tokens[0], setting.prompt_tokens[1] + 1, setting.num_prompts)
    prompts = [random.integers(0, shape.vocab_size, size) for size in sizes]
    spread = random.integers(setting.new_tokens[0], setting.new_tokens[1] + 1, setting.num_prompts)
    news = {"spread": spread, "equal": np.full(setting.num_prompts, round(spread.mean()))}
    for name, new in news.items():
        for row in run(lm, prompts, new, setting.batch)[0][:2]:
            given = {"max_new_tokens": int(new[row.index]), "stop_token_ids": []}
            alone = decodax.generate(lm, [prompts[row.index].tolist()], **given).tokens[0]
            common.require_equal_tokens(f"{name}, row {row.index}", row.tokens, alone)
    contestants = {name: lambda new=new: measured(lm, prompts, new, setting.batch) for name, new in news.items()}
    found = common.summarise(common.alternate(contestants, setting.rounds))
    quantities = ("decode tokens/s", "tokens/s with prompts")
    ratios = {name: found["spread"][name]["median"] / found["equal"][name]["median"] for name in quantities}
    rows = [[name, *(by[quantity]["median"] for quantity in by)] for name, by in found.items()]
    common.print_table(f"batch {setting.batch}, {setting.num_prompts} prompts", ["rows", *found["equal"]], rows)
    result = common.machine() | {"size": options.size, "target": TARGET, "shape": dataclasses.asdict(shape)}
    result |= {"setting": dataclasses.asdict(setting), "measured": found, "spread of equal": ratios}
    common.write_json(options.output, result)


if __name__ == "__main__":
    main()
