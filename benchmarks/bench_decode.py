"""Measures decoding speed on this CPU, in one run: decodax, transformers, llama.cpp, and memory bandwidth.

    python -m benchmarks.bench_decode

Part one: a random Llama shape in float32, batch 1, greedy. Every contestant first has to produce the same tokens, then
they alternate, and medians are compared. Only decoding is timed, not the prompt.

One decoding step reads every weight but the embedding once, so `weight bytes x tokens per second` is a lower bound of
the bandwidth used, set against the best of three ways to read a large array: a jitted JAX sum, a torch sum, and NumPy
sums in one thread per core. The roofline is the best median over the rounds of these.

Part two: batch 8 and a cache filled to different lengths in the same buffers. The time that a longer cache adds,
against the bytes up to the longest row that it adds, is attention's own bandwidth. Time that grows with the length
shows that attention reads up to the longest row; only once that row fills three quarters of the buffers are they read
in full, which takes less time (`WHOLE_FROM` in `core/blockwise_attention.py`).
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import _bench_common as common
from benchmarks import _bench_peers as peers
from decodax import decoding
from decodax.decoding.state import DecodeState
from decodax.models.model import Model, Params

SHAPES = {
    "full": common.Shape(12, 768, 12, 12, 64, 2048, 32000),
    "tiny": common.Shape(2, 32, 4, 2, 8, 48, 211),
}
TARGETS = {"transformers": 3.5, "llama.cpp": 1.0, "bandwidth": 0.8, "attention bandwidth": 0.5}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of the runs, in tokens.

    lengths: cached tokens of each row.
    spare: free slots after the longest of these.
    steps: timed at once.
    bandwidth_bytes: read per bandwidth measurement.
    """

    prompt: int
    new: int
    rounds: int
    batch: int
    lengths: tuple[int, ...]
    spare: int
    steps: int
    bandwidth_bytes: int


SETTINGS = {
    "full": Setting(24, 128, 5, 8, (256, 1024, 2048), 256, 8, 1 << 29),
    "tiny": Setting(5, 6, 1, 2, (256, 512), 64, 2, 1 << 20),
}


def bandwidth_contestants(num_bytes: int, threads: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Functions that read `num_bytes` once and return GB/s; one uses torch where it is installed."""
    array = np.ones(num_bytes // 4, np.float32)
    on_device = jnp.asarray(array)
    jax_sum = jax.jit(jnp.sum)
    pieces = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)
    readers: dict[str, Callable[[], object]] = {
        "read: JAX sum": lambda: jax_sum(on_device).block_until_ready(),
        "read: NumPy sums": lambda: list(pool.map(np.sum, pieces)),
    }
    try:
        import torch

        shared = torch.from_numpy(array)
        readers["read: torch sum"] = lambda: torch.sum(shared)
    except ImportError:
        Console().print("torch is not installed: the bandwidth is measured without it")

    def timed(read: Callable[[], object]) -> dict[str, float]:
        start = time.perf_counter()
        read()
        return {"GB/s": array.nbytes / (time.perf_counter() - start) / 1e9}

    return {name: lambda read=read: timed(read) for name, read in readers.items()}


def decodax_contestant(model: Model, params: Params) -> peers.Continue:
    decode = jax.jit(decoding.autoregressive(model), donate_argnums=1)

    def run(prompt: np.ndarray, num_new: int) -> tuple[np.ndarray, float]:
        state = decoding.prefill(model, params, prompt[None], np.array([len(prompt)]), num_new, np.zeros(1, np.uint32))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(decode(params, state))
        seconds = time.perf_counter() - start
        return np.asarray(state.tokens)[0, len(prompt) : len(prompt) + num_new], num_new / seconds

    return run


def alone(shape: common.Shape, setting: Setting, threads: int, without: list[str]) -> dict:
    """Runs part one; returns its result."""
    model = shape.model()
    params = common.random_params(model, seed=0)
    prompt = np.random.default_rng(0).integers(0, shape.vocab_size, setting.prompt).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"decodax": decodax_contestant(model, params)}
        if "transformers" not in without:
            runs["transformers"] = peers.transformers_peer(shape, params, threads)
        if "llama.cpp" not in without:
            num_tokens = setting.prompt + setting.new
            runs["llama.cpp"] = peers.llama_cpp_peer(shape, params, threads, Path(folder), num_tokens)
        expected = check(model, params, prompt, setting.new, runs)
        contestants = {
            name: lambda run=run: {"tokens/s": run(prompt, setting.new)[1]} for name, run in runs.items()
        } | bandwidth_contestants(setting.bandwidth_bytes, threads)
        measured = common.summarise(common.alternate(contestants, setting.rounds))
    return report_alone(measured, params, setting, expected)


def check(
    model: Model, params: Params, prompt: np.ndarray, num_new: int, runs: dict[str, peers.Continue]
) -> np.ndarray:
    """The correctness gate: every contestant gives the tokens that a full forward without cache gives."""
    Console().print(f"correctness gate: {num_new} greedy tokens of {', '.join(runs)}")
    ours = runs["decodax"](prompt, num_new)[0]
    text = np.concatenate([prompt, ours])[None]
    best = common.full_forward_greedy(model, params, text)
    common.require_equal_tokens("decodax", ours, best[0, len(prompt) - 1 : -1])
    for name, run in runs.items():
        common.require_equal_tokens(name, run(prompt, num_new)[0], ours)
    return ours


def report_alone(measured: dict, params: Params, setting: Setting, expected: np.ndarray) -> dict:
    best_read = max((name for name in measured if name.startswith("read")), key=lambda n: measured[n]["GB/s"]["median"])
    bandwidth = measured[best_read]["GB/s"]["median"]
    weight_bytes = common.weight_bytes_read(params)
    speed = {name: by["tokens/s"] for name, by in measured.items() if "tokens/s" in by}
    ours = speed["decodax"]["median"]
    rows = []
    for name, value in speed.items():
        used = value["median"] * weight_bytes / 1e9
        ratio = ours / value["median"]
        rows.append([name, value["median"], value["min"], value["max"], used, used / bandwidth, ratio])
    title = f"batch 1, {setting.new} new tokens, float32; {best_read} {bandwidth:.1f} GB/s is the roofline"
    columns = ["", "tokens/s", "min", "max", "GB/s of weights", "of roofline", "decodax is x times as fast"]
    common.print_table(title, columns, rows)
    return {
        "measured": measured,
        "roofline": best_read,
        "roofline_gb_per_s": bandwidth,
        "weight_bytes_per_token": weight_bytes,
        "fraction_of_roofline": {row[0]: row[5] for row in rows},
        "decodax_times_as_fast": {row[0]: row[6] for row in rows if row[0] != "decodax"},
        "same_tokens": len(expected),
    }


def filled_state(model: Model, params: Params, setting: Setting) -> DecodeState:
    """A state whose caches hold random keys and values in every slot, so that any length can be set."""
    prompt = np.zeros((setting.batch, 2), np.int32)
    new = max(setting.lengths) + setting.spare - 2
    state = decoding.prefill(
        model, params, prompt, np.full(setting.batch, 2), new, np.arange(setting.batch, dtype=np.uint32)
    )
    key = jax.random.key(1, impl="rbg")

    def fill(index: int, cache):
        keys = jax.random.split(jax.random.fold_in(key, index))
        values = [jax.random.normal(one, cache.key.shape, cache.key.dtype) for one in keys]
        return dataclasses.replace(cache, key=values[0], value=values[1])

    return dataclasses.replace(state, caches=tuple(fill(i, cache) for i, cache in enumerate(state.caches)))


def at_length(state: DecodeState, length: int) -> DecodeState:
    """The state with `length` tokens cached in every row."""
    lengths = np.full(state.length.shape, length, np.int32)
    caches = tuple(dataclasses.replace(cache, length=jnp.asarray(lengths)) for cache in state.caches)
    no = jnp.zeros(lengths.shape, bool)
    return dataclasses.replace(state, caches=caches, length=jnp.asarray(lengths + 1), done=no)


def deep(shape: common.Shape, setting: Setting, threads: int) -> dict:
    """Runs part two; returns its result."""
    model = shape.model()
    params = common.random_params(model, seed=0)
    held = [filled_state(model, params, setting)]
    decode = jax.jit(decoding.autoregressive(model), donate_argnums=1)

    def step_ms(length: int) -> dict[str, float]:
        # The last of the timed steps reads `length` tokens.
        state = jax.block_until_ready(at_length(held.pop(), length - setting.steps))
        start = time.perf_counter()
        state = jax.block_until_ready(decode(params, state, setting.steps))
        seconds = time.perf_counter() - start
        held.append(state)
        return {"ms/step": seconds / setting.steps * 1e3}

    contestants = {f"{length} cached": lambda length=length: step_ms(length) for length in setting.lengths}
    measured = common.summarise(
        common.alternate(contestants | bandwidth_contestants(setting.bandwidth_bytes, threads), setting.rounds)
    )
    bandwidth = max(by["GB/s"]["median"] for name, by in measured.items() if name.startswith("read"))
    cache = held[0].caches[0]
    bytes_per_token = sum(x.nbytes // cache.capacity for c in held[0].caches for x in (c.key, c.value))
    shortest, rows = measured[f"{setting.lengths[0]} cached"]["ms/step"]["median"], []
    for length in setting.lengths:
        ms = measured[f"{length} cached"]["ms/step"]["median"]
        extra = (length - setting.lengths[0]) * bytes_per_token
        used = extra / (ms - shortest) / 1e6 if length > setting.lengths[0] else float("nan")
        rows.append([length, ms, extra / 1e6, used, used / bandwidth])
    title = (
        f"batch {setting.batch}, all rows equally long, capacity {cache.capacity}; {bandwidth:.1f} GB/s is the roofline"
    )
    common.print_table(title, ["cached", "ms per step", "more MB to read", "GB/s of them", "of roofline"], rows)
    return {
        "measured": measured,
        "capacity": cache.capacity,
        "roofline_gb_per_s": bandwidth,
        "cache_bytes_per_token_of_all_rows": bytes_per_token,
        "attention_gb_per_s": {row[0]: row[3] for row in rows[1:]},
        "attention_fraction_of_roofline": {row[0]: row[4] for row in rows[1:]},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="full")
    parser.add_argument("--threads", type=int, default=2, help="threads of the other contestants (default 2)")
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up (default 5)")
    parser.add_argument("--part", choices=["alone", "deep"], action="append", help="only this part (default both)")
    parser.add_argument("--without", choices=["transformers", "llama.cpp"], action="append", default=[])
    parser.add_argument("--output", type=Path, default=common.RESULTS / "bench_decode_cpu.json")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "cpu":
        parser.error("this benchmark compares CPU programs: run it with JAX_PLATFORMS=cpu (bench_gpu.py is for GPUs)")
    setting = SETTINGS[options.size]
    setting = dataclasses.replace(setting, rounds=options.rounds or setting.rounds)
    parts = options.part or ["alone", "deep"]
    result = common.machine() | {"size": options.size, "targets": TARGETS}
    result |= {"shape": dataclasses.asdict(SHAPES[options.size]), "setting": dataclasses.asdict(setting)}
    try:
        if "alone" in parts:
            result["alone"] = alone(SHAPES[options.size], setting, options.threads, options.without)
    except ImportError as error:
        missing = {"gguf": "llama.cpp", "llama_cpp": "llama.cpp"}.get(error.name or "", "transformers")
        raise SystemExit(f"{error}: install decodax[bench], or leave it out with --without {missing}") from error
    if "deep" in parts:
        result["deep"] = deep(SHAPES[options.size], setting, options.threads)
    common.write_json(options.output, result)


if __name__ == "__main__":
    main()
