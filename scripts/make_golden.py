"""Writes tests/golden/: tiny random models of every family, with the outputs of `transformers` for them.

    pip install "transformers>=5" torch
    python -m decodax.scripts.make_golden [CASE ...]
    python -m decodax.scripts.make_golden --bfloat16

Each case is a model folder (config.json in the spelling of transformers 4 or 5, written here by hand; model.safetensors
with every parameter random, norms and biases too) and a golden.npz:

    tokens[B, T], length[B]    prompts of different length, padded with 0
    logits[B, T, V]            of each prompt run alone, 0 where padded
    generated[B, 24]           greedy continuation of each prompt alone, through transformers' own cache

The case that has a family's name also has golden_bfloat16.npz, with `bits`[B, T, V]: the same logits computed in
bfloat16, from the weights rounded to it, as the bits of those numbers (uint16).

All else is float32 with plain attention. Seeds are tried until no greedy choice is closer than MIN_GAP, so that
another order of additions cannot change a token, no continuation repeats itself, and float64 gives nearly the same
logits, so that they do not depend on rounding.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from decodax.models.families import FAMILIES
from decodax.scripts._golden_cases import CASES, STACKED, implementations
from decodax.scripts._golden_quantised import packed_fp8, packed_mxfp4

NEW_TOKENS = 24
MIN_GAP = 2e-3  # between the two largest logits of every greedy step
MAX_ROUNDING = 2e-5  # between logits in float32 and in float64
UNIT_OFFSET = ("gemma", "gemma2", "gemma3_text", "nemotron", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
MIN_DISTINCT = 6  # different tokens in every continuation: one that repeats itself tests little
PROMPT_LENGTHS = (5, 23, 11)  # longer and shorter than the windows and original lengths below
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def randomise(model: Any, seed: int) -> None:
    """Makes every parameter random: matrices keep the size of their inputs, norms and biases vary by 0.3."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    for name, parameter in parameters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            sharper = (
                1.5 if any(part in name for part in ("q_proj", "k_proj", "query_key", "c_attn")) else 1.0
            )  # or attention would be nearly uniform
            # A tied embedding has to be small, or every token is followed by itself.
            embedding_size = 0.1 if model.config.tie_word_embeddings else 0.5
            is_transposed = model.config.model_type == "gpt2" or (
                model.config.model_type == "gpt_oss" and parameter.ndim == 3
            )
            num_inputs = parameter.shape[-2 if is_transposed else -1]
            is_embedding = any(part in name for part in ("embed_", "embeddings.", "wte", "wpe"))
            size = embedding_size if is_embedding else sharper / math.sqrt(num_inputs)
            parameter.data = noise * size * (3.0 if "lm_head" in name else 1.0)
        else:
            offset = model.config.model_type in UNIT_OFFSET and "linear_attn" not in name
            around = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") and not offset else 0.0
            parameter.data = around + 0.3 * noise


def load_alone(folder: Path, precision: str) -> Any:
    """The model of a folder, loaded anew: transformers' dynamic scaling remembers the longest row it has seen."""
    import torch
    from transformers import AutoModelForCausalLM

    chosen = implementations(json.loads((folder / "config.json").read_text()))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision), **chosen).eval()


def run_alone(folder: Path, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Logits [T, V] of one prompt, its greedy continuation [24], and how clear they are.

    The last two are the smallest gap between two largest logits, and the largest difference to the logits in float64.
    """
    import torch

    model = load_alone(folder, "float32")
    tokens = torch.tensor(prompt)[None]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0].numpy()
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        precise = load_alone(folder, "float64")(tokens, use_cache=False).logits[0].numpy()
    top = torch.cat(output.logits).topk(2, dim=-1).values
    gap, rounding = float((top[:, 0] - top[:, 1]).min()), float(np.abs(logits - precise).max())
    return logits, output.sequences[0, len(prompt) :].numpy(), gap, rounding


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Writes a model folder in Hugging Face format."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def random_tensors(config: dict[str, Any], seed: int, *, stacked: bool) -> dict[str, Any]:
    """The tensors of a random model's checkpoint: `stacked` as transformers computes with them, or as it saves them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        randomise(model, seed)
        if stacked:
            tied = model.config.tie_word_embeddings
            return {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
        model.save_pretrained(folder)
        return load_file(folder / "model.safetensors")


def write_case(name: str, config: dict[str, Any]) -> None:
    """Writes one folder of tests/golden, with the first seed whose greedy choices are all clear and varied."""
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    quantization = config.get("quantization_config")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for seed in range(100):
        packed = tensors = random_tensors(plain, seed, stacked=name in STACKED)
        if quantization is not None and quantization["quant_method"] == "fp8":
            tensors, packed = packed_fp8(tensors, quantization["weight_block_size"])
        elif quantization is not None:
            tensors, packed = packed_mxfp4(tensors)
        generator = np.random.default_rng(seed)
        rows = [generator.integers(0, config["vocab_size"], length) for length in PROMPT_LENGTHS]
        with tempfile.TemporaryDirectory() as temporary:
            write_model(Path(temporary), plain, tensors)
            results = [run_alone(Path(temporary), row) for row in rows]
        gap, rounding = min(result[2] for result in results), max(result[3] for result in results)
        variety = [len(set(result[1].tolist())) for result in results]
        if gap > MIN_GAP and rounding < MAX_ROUNDING and min(variety) >= MIN_DISTINCT:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives clear, varied and well-conditioned results")
    write_model(folder, config, packed)
    tokens = np.zeros((len(rows), max(PROMPT_LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, config["vocab_size"]), np.float32)
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        tokens[index, : len(row)] = row
        logits[index, : len(row)] = result[0]
    generated = np.stack([result[1] for result in results]).astype(np.int32)
    np.savez(folder / "golden.npz", tokens=tokens, length=np.int32(PROMPT_LENGTHS), logits=logits, generated=generated)
    found = f"gap {gap:.4f} rounding {rounding:.1e} logits up to {np.abs(logits).max():5.2f} distinct tokens {variety}"
    print(f"{name:18} seed {seed:2} {found}")


def write_bfloat16(name: str) -> None:
    """Writes the logits of a case in bfloat16 beside those in float32."""
    import torch

    folder = GOLDEN / name
    with np.load(folder / "golden.npz") as file:
        tokens, lengths, bits = file["tokens"], file["length"], np.zeros(file["logits"].shape, np.uint16)
    for row, length in enumerate(lengths):
        model = load_alone(folder, "bfloat16")
        with torch.no_grad():
            logits = model(torch.tensor(tokens[row, :length])[None].long(), use_cache=False).logits[0]
        bits[row, :length] = logits.to(torch.bfloat16).view(torch.uint16).numpy()
    np.savez_compressed(folder / "golden_bfloat16.npz", bits=bits)
    print(f"{name:18} bfloat16")


def main() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:] == ["--bfloat16"]:
        for name in FAMILIES:
            write_bfloat16(name)
        return
    names = sys.argv[1:] or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        raise SystemExit(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    for name in names:
        write_case(name, CASES[name])
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(f"{len(names)} cases, {size / 1e6:.2f} MB in {GOLDEN}")


if __name__ == "__main__":
    main()
