"""Measures decoding speed on an accelerator: a random 8-billion Llama-3 shape in bfloat16, its bandwidth and a peer.

    python -m benchmarks.bench_gpu                     # on a GPU
    python -m benchmarks.bench_gpu --size tiny --without transformers    # anywhere, to see that it works

First the gate: the same code in float32 at a tiny size equals its own full forward. Then batch 1, 8 and 64, each with
a prompt of 128 tokens and 128 new ones. The roofline is the best of two readings of the device's memory in the same
rounds (a sum, and a copy, which counts twice); a step reads every weight but the embedding, plus the filled cache.

The peer is transformers with a static cache and `torch.compile(mode="reduce-overhead")`. Every round of a contestant is
a process of its own, and they alternate: so only one framework holds memory at a time.

XLA turns groups of operations of a step into command buffers (CUDA graphs); the loop around it launches one after the
other. Which kinds of operation they include is an XLA flag: run again with
`--xla-flags=--xla_gpu_enable_command_buffer=` to switch them off, and compare. The result holds the flags in force.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import _bench_common as common
from decodax import decoding

SHAPES = {
    "8b": common.Shape(32, 4096, 32, 8, 128, 14336, 128256, rope_base=500000.0),
    "tiny": common.Shape(2, 32, 4, 2, 8, 48, 211),
}
BATCHES = {"8b": (1, 8, 64), "tiny": (1, 3)}
TOKENS = {"8b": (128, 128), "tiny": (7, 6)}  # prompt, new
READ_BYTES = {"8b": 1 << 32, "tiny": 1 << 20}
TARGETS = {"bandwidth at batch 1": 0.80, "transformers": 1.3, "compile seconds of 32 layers": 60}


def check() -> None:
    """The correctness gate: greedy tokens in float32 equal those of a full forward without cache."""
    shape = SHAPES["tiny"]
    model = shape.model()
    with jax.default_matmul_precision("highest"):
        params = common.random_params(model, seed=0)
        lengths = np.array([9, 5, 7])
        prompt = np.random.default_rng(0).integers(0, shape.vocab_size, (3, 9)).astype(np.int32)
        state = decoding.prefill(model, params, prompt, lengths, 16, np.arange(3, dtype=np.uint32))
        state = jax.jit(decoding.autoregressive(model), donate_argnums=1)(params, state)
        tokens = np.asarray(state.tokens)
        best = common.full_forward_greedy(model, params, tokens)
    for row, length in enumerate(lengths):
        common.require_equal_tokens(
            f"decodax, row {row}", tokens[row, length : length + 16], best[row, length - 1 : length + 15]
        )


def bandwidth(num_bytes: int) -> float:
    """GB/s of the best of a sum over a large array and a copy of it, medians of five."""
    array = jnp.ones(num_bytes // 4, jnp.float32)
    readers: dict[Callable, int] = {jax.jit(jnp.sum): 1, jax.jit(lambda x: x + 1): 2}
    best = 0.0
    for reader, passes in readers.items():
        seconds = []
        for turn in range(6):
            start = time.perf_counter()
            jax.block_until_ready(reader(array))
            if turn:
                seconds.append(time.perf_counter() - start)
        best = max(best, passes * array.nbytes / float(np.median(seconds)) / 1e9)
    return best


def measure_ours(size: str) -> dict:
    """One round: roofline, cold compile seconds, and tokens per second at every batch size."""
    shape = SHAPES[size]
    num_prompt, num_new = TOKENS[size]
    result: dict = {"GB/s": bandwidth(READ_BYTES[size]), "batch": {}}
    model = shape.model()
    params = common.random_params(model, seed=0, dtype=jnp.bfloat16)
    decode = jax.jit(decoding.autoregressive(model), donate_argnums=1)
    for batch in BATCHES[size]:
        prompt = np.random.default_rng(0).integers(0, shape.vocab_size, (batch, num_prompt)).astype(np.int32)
        lengths, seed = np.full(batch, num_prompt), np.arange(batch, dtype=np.uint32)

        def start_state(prompt=prompt, lengths=lengths, seed=seed):
            return jax.block_until_ready(decoding.prefill(model, params, prompt, lengths, num_new, seed))

        state = start_state()
        start = time.perf_counter()
        compiled = decode.lower(params, state).compile()
        compile_seconds = time.perf_counter() - start
        cache_token_bytes = sum(x.nbytes // c.capacity for c in state.caches for x in (c.key, c.value))
        jax.block_until_ready(compiled(params, state))
        state = start_state()
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, state))
        seconds = time.perf_counter() - start
        step_bytes = common.weight_bytes_read(params) + cache_token_bytes * (num_prompt + num_new / 2)
        result["batch"][str(batch)] = {
            "tokens/s": batch * num_new / seconds,
            "GB/s used": step_bytes * num_new / seconds / 1e9,
            "of roofline": step_bytes * num_new / seconds / 1e9 / result["GB/s"],
            "compile_seconds": compile_seconds,
            "command_buffers": len(re.findall(r"\bcommand_buffer[\w.]* \(", compiled.as_text())),
        }
    return result


def measure_transformers(size: str) -> dict:
    """One round of the peer: tokens per second at every batch size, prompt excluded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    num_prompt, num_new = TOKENS[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape.hf_config()), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model.generation_config.cache_implementation = "static"
    if device == "cuda":
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    result: dict = {"batch": {}}
    for batch in BATCHES[size]:
        tokens = torch.randint(0, shape.vocab_size, (batch, num_prompt), device=device)

        def seconds(count: int, tokens=tokens) -> float:
            start = time.perf_counter()
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        for _ in range(3):  # compiles, records the graphs, runs them
            seconds(num_new)
        seconds(1)
        whole, prompt_only = seconds(num_new), seconds(1)
        result["batch"][str(batch)] = {"tokens/s": batch * (num_new - 1) / (whole - prompt_only)}
    return result


MEASURE = {"decodax": measure_ours, "transformers": measure_transformers}


def in_a_process(name: str, options: argparse.Namespace) -> dict:
    """Runs one round of a contestant in a fresh process, and reads the last line that it prints."""
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {options.xla_flags}".strip()
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--size", options.size, "--measure", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}; --without transformers leaves the peer out")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(rounds: dict[str, list[dict]], size: str) -> dict:
    """Medians over the rounds, as a table and as the main entries of the result."""
    result: dict = {"roofline_gb_per_s": common.summary([turn["GB/s"] for turn in rounds["decodax"]]), "batch": {}}
    rows = []
    for batch in map(str, BATCHES[size]):
        by_name = {
            name: {
                key: common.summary([turn["batch"][batch][key] for turn in turns]) for key in turns[0]["batch"][batch]
            }
            for name, turns in rounds.items()
        }
        ours = by_name["decodax"]
        peer = by_name["transformers"]["tokens/s"]["median"] if "transformers" in by_name else None
        speed = ours["tokens/s"]["median"]
        times = speed / peer if peer else None
        compile_s = ours["compile_seconds"]["median"]
        rows.append([batch, speed, ours["of roofline"]["median"], peer, times, compile_s])
        result["batch"][batch] = by_name | {"times_transformers": times}
    columns = ["batch", "decodax tokens/s", "of roofline", "transformers", "times as fast", "compile s"]
    common.print_table(f"{size}, bfloat16, {result['roofline_gb_per_s']['median']:.0f} GB/s", columns, rows)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="8b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", choices=["transformers"], action="append", default=[])
    parser.add_argument("--xla-flags", default="", help="added to XLA_FLAGS of our process")
    parser.add_argument("--output", type=Path, help="default: results/bench_gpu_<device>.json")
    parser.add_argument("--measure", choices=list(MEASURE), help="one round of one contestant, printed as JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(MEASURE[options.measure](options.size)))
        return
    # Until the end only processes of their own use devices: a process that holds one occupies its memory.
    names = [name for name in MEASURE if name not in options.without]
    Console().print("correctness gate: greedy tokens in float32 against a full forward")
    gate = [sys.executable, "-c", "from benchmarks import bench_gpu; bench_gpu.check()"]
    if subprocess.run(gate, check=False).returncode:
        raise SystemExit("correctness gate: failed, nothing was measured")
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    schedule = [(turn, name) for turn in range(options.rounds) for name in names]
    for _, name in track(schedule, f"{options.rounds} rounds of {len(names)}", transient=True):
        rounds[name].append(in_a_process(name, options))
    result = report(rounds, options.size)
    machine = common.machine()
    if options.size != "tiny" and jax.default_backend() == "cpu":
        Console().print("note: no accelerator was found, this ran on the CPU")
    shape = {"shape": dataclasses.asdict(SHAPES[options.size]), "targets": TARGETS}
    flags = {"xla_flags": f"{os.environ.get('XLA_FLAGS', '')} {options.xla_flags}".strip()}
    device = re.sub(r"\W+", "_", machine["device"]).strip("_").lower()
    path = options.output or common.RESULTS / f"bench_gpu_{device}.json"
    common.write_json(path, machine | shape | flags | result)


if __name__ == "__main__":
    main()
