"""Measures decoding speed of models with experts on an accelerator, with and without kernels, beside its bandwidth.

    python -m benchmarks.bench_experts_gpu                    # on a GPU: both shapes, batch 1, 8 and 64
    python -m benchmarks.bench_experts_gpu --shape tiny       # anywhere, to see that it works

Random weights in bfloat16 of a DeepSeek-V2-Lite (15.7 billion parameters, latent attention) and of a Qwen3-30B-A3B.
First the gate: logits of a step with the kernels are those without, within bfloat16's rounding. Then, in alternating
rounds, each in a process of its own, 128 prompt tokens and 128 new ones.

The roofline is what a step has to read at the best bandwidth that a sum or a copy reaches in the same round: all
weights but the embedding and the experts that no token chose (counted from the routes of the tokens decoded), and the
filled cache.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import _bench_common as common
from benchmarks.bench_gpu import bandwidth
from decodax import decoding
from decodax.layers.execution import Execution
from decodax.layers.moe.layer import MoEConfig
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model, Params

SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "num_experts_per_tok": 6,
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
    },
    "qwen3_30b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
    "tiny": {
        "model_type": "deepseek_v2",
        "vocab_size": 211,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}
BATCHES = {"tiny": (1, 3)}
TOKENS = {"tiny": (7, 6)}  # prompt, new
READ_BYTES = {"tiny": 1 << 20}
WITH: dict[str, Execution] = {"kernels": Execution(), "xla": Execution("xla")}
TOLERANCE = 0.03  # of the largest logit: bfloat16 rounds to 0.004, and two layers add in other orders


def model_of(shape: str, variant: str, num_layers: int | None = None) -> Model:
    raw = SHAPES[shape]
    config = read_config(raw | {"num_hidden_layers": num_layers or raw["num_hidden_layers"]})[1]
    return Model(config, execution=WITH[variant])


def started(model: Model, params: Params, shape: str, batch: int) -> decoding.DecodeState:
    num_prompt, num_new = TOKENS.get(shape, (128, 128))
    prompt = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, num_prompt)).astype(np.int32)
    lengths, seeds = np.full(batch, num_prompt), np.arange(batch, dtype=np.uint32)
    return jax.block_until_ready(decoding.prefill(model, params, prompt, lengths, num_new, seeds))


def step(model: Model, params: Params, state: decoding.DecodeState) -> tuple[jax.Array, Any]:
    """Logits of the last tokens, and their routes."""
    forward = model.apply(params, state.last_token()[:, None], state.length[:, None] - 1, state.caches)
    return model.logits(params, forward.hidden), forward.routes


def check(shape: str) -> None:
    """The gate, on the first two layers."""
    logits = {}
    for variant in WITH:
        model = model_of(shape, variant, 2)
        params = common.random_params(model, seed=0, dtype=jnp.bfloat16)
        state = started(model, params, shape, 3)
        logits[variant] = np.asarray(jax.jit(step, static_argnums=0)(model, params, state)[0])
    difference = np.abs(logits["kernels"] - logits["xla"]).max() / np.abs(logits["xla"]).max()
    if not difference <= TOLERANCE:
        raise SystemExit(f"correctness gate: {shape} with kernels differs by {difference} of the largest logit")


def step_bytes(model: Model, params: Params, state: decoding.DecodeState, routes: Any) -> float:
    """Bytes that a step halfway through has to read."""
    total = common.weight_bytes_read(params)
    for index, (block, chosen) in enumerate(zip(model.config.blocks, routes, strict=True)):
        if isinstance(block.feed_forward_layer, MoEConfig):
            experts = params[f"blocks_{index}"]["feed_forward"]["experts"]
            used = len(np.unique(np.asarray(chosen.expert)))
            total -= sum(x.nbytes for x in jax.tree.leaves(experts)) * (
                1 - used / block.feed_forward.layer.router.num_experts
            )
    cached = sum(
        leaf.nbytes / cache.capacity for cache in state.caches for leaf in jax.tree.leaves(cache) if leaf.ndim > 1
    )
    return total + cached * float(np.mean(state.length))


def measure(shape: str, variant: str) -> dict[str, Any]:
    """One round: the bandwidth, and tokens per second at every batch size."""
    result: dict[str, Any] = {"GB/s": bandwidth(READ_BYTES.get(shape, 1 << 32)), "batch": {}}
    model = model_of(shape, variant)
    params = common.random_params(model, seed=0, dtype=jnp.bfloat16)
    decode = jax.jit(decoding.autoregressive(model), donate_argnums=1)
    num_new = TOKENS.get(shape, (128, 128))[1]
    for batch in BATCHES.get(shape, (1, 8, 64)):
        state = started(model, params, shape, batch)
        begin = time.perf_counter()
        compiled = decode.lower(params, state).compile()
        compile_seconds = time.perf_counter() - begin
        ended = jax.block_until_ready(compiled(params, state))
        num_bytes = step_bytes(model, params, ended, jax.jit(step, static_argnums=0)(model, params, ended)[1])
        state = started(model, params, shape, batch)
        begin = time.perf_counter()
        jax.block_until_ready(compiled(params, state))
        seconds = time.perf_counter() - begin
        used = num_bytes * num_new / seconds / 1e9
        result["batch"][str(batch)] = {
            "tokens/s": batch * num_new / seconds,
            "GB/s used": used,
            "of roofline": used / result["GB/s"],
            "compile_seconds": compile_seconds,
        }
    return result


def in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.bench_experts_gpu", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with exit code {done.returncode}: nothing was written")
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: both large ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: results/bench_experts_<device>.json")
    parser.add_argument("--check", action="store_true", help="the gate alone, for the first shape")
    parser.add_argument("--measure", choices=list(WITH), help="one round of one contestant, printed as JSON")
    options = parser.parse_args(arguments)
    shapes = options.shape or [name for name in SHAPES if name != "tiny"]
    if options.check:
        check(shapes[0])
        return
    if options.measure:
        print(json.dumps(measure(shapes[0], options.measure)))
        return
    results: dict[str, Any] = {}
    for shape in shapes:  # each in its own processes: one that holds a device occupies its memory
        Console().print(f"{shape}: the gate, a step with kernels against one without")
        in_a_process("--shape", shape, "--check")
        schedule = [variant for _ in range(options.rounds) for variant in WITH]
        rounds: dict[str, list[dict[str, Any]]] = {variant: [] for variant in WITH}
        for variant in track(schedule, f"{options.rounds} rounds of {len(WITH)}", transient=True):
            printed = in_a_process("--shape", shape, "--measure", variant)
            rounds[variant].append(json.loads(printed.strip().splitlines()[-1]))
        results[shape] = report(shape, rounds)
    machine = common.machine()
    device = re.sub(r"\W+", "_", machine["device"]).strip("_").lower()
    path = options.output or common.RESULTS / f"bench_experts_{device}.json"
    common.write_json(path, machine | {"shapes": {name: SHAPES[name] for name in shapes}, "results": results})


def report(shape: str, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, printed as a table."""
    result: dict[str, Any] = {"GB/s": common.summary([turn["GB/s"] for turns in rounds.values() for turn in turns])}
    rows = []
    for batch in next(iter(rounds.values()))[0]["batch"]:
        by_variant = {
            variant: {
                key: common.summary([turn["batch"][batch][key] for turn in turns]) for key in turns[0]["batch"][batch]
            }
            for variant, turns in rounds.items()
        }
        result[batch] = by_variant
        speed = {variant: values["tokens/s"]["median"] for variant, values in by_variant.items()}
        shares = [by_variant[variant]["of roofline"]["median"] for variant in WITH]
        rows.append([batch, speed["kernels"], speed["xla"], speed["kernels"] / speed["xla"], *shares])
    columns = ["batch", "kernels tokens/s", "XLA tokens/s", "times as fast", "of roofline", "XLA of roofline"]
    common.print_table(f"{shape}, bfloat16, {result['GB/s']['median']:.0f} GB/s", columns, rows)
    return result


if __name__ == "__main__":
    main()
