"""Measures decoding speed of a mixture of experts on CPU, beside transformers and a dense model of its active size.

    pip install "decodax[bench]"
    python -m benchmarks.bench_experts
    python -m benchmarks.bench_experts --size tiny --without transformers    # to see that it works

A random Qwen3-MoE of 150 million parameters, eight of 64 experts for every token, in float32. First the gate: its
greedy tokens are those of transformers. Then batch 1 and 4, in alternating rounds:

- transformers, with each of its dispatch algorithms; the fastest one is the peer;
- a dense model whose MLP is as wide as the eight experts together: the cost of decoding without routing.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import decodax
from benchmarks import _bench_common as common
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model

SIZES: dict[str, dict[str, Any]] = {
    "150m": {
        "vocab_size": 16000,
        "hidden_size": 512,
        "moe_intermediate_size": 192,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
TOKENS = {"150m": (64, 64), "tiny": (5, 6)}  # prompt, new
BATCHES = (1, 4)
DISPATCHES = ("eager", "batched_mm", "grouped_mm")  # of transformers
TARGETS = {"times transformers": 2.0, "times the seconds of a dense model": 1.5}


def fields(size: str) -> dict[str, Any]:
    """The config.json of the mixture."""
    sizes = SIZES[size]
    wide = sizes["moe_intermediate_size"] * sizes["num_experts_per_tok"]
    rest = {"norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 1024}
    return {"model_type": "qwen3_moe", "intermediate_size": wide, **sizes, **rest}


def peer(size: str, folder: Path) -> Any:
    """A random model of transformers, saved to `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields(size), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # sharper than a fresh model, so that no two logits are nearly equal
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def prompts(size: str, batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, SIZES[size]["vocab_size"], (batch, TOKENS[size][0]))


def ours(lm: decodax.LanguageModel, size: str, batch: int) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        done = decodax.generate(lm, list(prompts(size, batch)), max_new_tokens=TOKENS[size][1], stop_token_ids=[])
        return {"tokens/s": done.stats.tokens_per_second}

    return run


def theirs(model: Any, dispatch: str, size: str, batch: int) -> Callable[[], dict[str, float]]:
    import torch

    tokens = torch.from_numpy(prompts(size, batch))
    num_new = TOKENS[size][1]

    def run() -> dict[str, float]:
        model.set_experts_implementation(dispatch)
        times: list[float] = []

        def after_each_token(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        options = {"max_new_tokens": num_new, "do_sample": False, "stopping_criteria": [after_each_token]}
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return {"tokens/s": batch * (num_new - 1) / (times[-1] - times[0])}

    return run


def check(lm: decodax.LanguageModel, model: Any, size: str) -> None:
    """The gate: the greedy tokens of a batch are those of a full forward, and those of transformers."""
    tokens, num_new = prompts(size, 3), TOKENS[size][1]
    got = np.stack(decodax.generate(lm, list(tokens), max_new_tokens=num_new, stop_token_ids=[]).tokens)
    whole = np.concatenate([tokens, got], axis=1).astype(np.int32)
    best = common.full_forward_greedy(lm.model, lm.params, whole)
    common.require_equal_tokens("decodax", got, best[:, tokens.shape[1] - 1 : -1])
    if model is None:
        return
    import torch

    model.set_experts_implementation("eager")
    given = torch.from_numpy(tokens)
    with torch.inference_mode():
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=num_new, do_sample=False)
    common.require_equal_tokens("transformers", out[:, tokens.shape[1] :].numpy(), got)


def random_model(raw: dict[str, Any]) -> decodax.LanguageModel:
    """A model with random weights, without a tokenizer or a folder."""
    model = Model(read_config(raw)[1])
    return decodax.LanguageModel(model, model.config, common.random_params(model, seed=0), None, Path("random"), ())


def dense_model(size: str) -> decodax.LanguageModel:
    """A model without experts that reads as many weights for a token."""
    raw = fields(size) | {"model_type": "qwen3"}
    for name in ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"):
        del raw[name]
    return random_model(raw)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="150m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", choices=["transformers"], action="append", default=[])
    parser.add_argument("--output", type=Path, default=common.RESULTS / "bench_experts_cpu.json")
    options = parser.parse_args(arguments)
    size, model, dispatches = options.size, None, () if options.without else DISPATCHES
    if dispatches:
        with tempfile.TemporaryDirectory() as name:
            model = peer(size, Path(name))
            lm = decodax.load(name, dtype="float32")
    else:
        lm = random_model(fields(size))
    Console().print("correctness gate: greedy tokens in float32")
    check(lm, model, size)
    dense = dense_model(size)
    result: dict[str, Any] = {"batch": {}}
    rows = []
    for batch in BATCHES:
        contestants = {"decodax": ours(lm, size, batch), "dense": ours(dense, size, batch)}
        contestants |= {f"transformers {dispatch}": theirs(model, dispatch, size, batch) for dispatch in dispatches}
        measured = common.summarise(common.alternate(contestants, options.rounds))
        speed = {name: values["tokens/s"]["median"] for name, values in measured.items()}
        best = max((speed[f"transformers {dispatch}"] for dispatch in dispatches), default=None)
        times = None if best is None else speed["decodax"] / best
        slower = speed["dense"] / speed["decodax"]
        result["batch"][str(batch)] = measured | {"times_transformers": times, "times_dense": slower}
        rows.append([str(batch), speed["decodax"], best, times, speed["dense"], slower])
    columns = ["batch", "decodax tokens/s", "transformers", "times as fast", "dense tokens/s", "times decodax"]
    common.print_table(f"{size}, float32", columns, rows)
    sizes = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm.params)),
        "dense parameters": sum(leaf.size for leaf in jax.tree.leaves(dense.params)),
    }
    common.write_json(options.output, common.machine() | {"shape": fields(size), "targets": TARGETS} | sizes | result)


if __name__ == "__main__":
    main()
