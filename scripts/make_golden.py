"""Writes tests/golden/: tiny random models of every family, with what `transformers` computes for them.

    pip install "transformers>=5" torch
    python -m decodax.scripts.make_golden

Each case is a model folder (config.json in the spelling of transformers 4 or 5, written here by hand; model.safetensors
with every parameter random, norms and biases too) and a golden.npz:

    tokens[B, T], length[B]    prompts of different length, padded with 0
    logits[B, T, V]            of each prompt run alone, 0 where padded
    generated[B, 24]           greedy continuation of each prompt alone, through transformers' own cache

Everything is float32 with eager attention. Seeds are tried until no greedy choice is closer than MIN_GAP, so that
another order of additions cannot change a token, and no continuation repeats itself.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 24
MIN_GAP = 2e-3  # between the two largest logits of every greedy step
MIN_DISTINCT = 6  # different tokens in every continuation: one that repeats itself tests little
PROMPT_LENGTHS = (5, 23, 11)  # longer and shorter than the windows and original lengths below
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"

# All sizes differ, so that a swapped axis cannot pass by luck; 6 query heads share 2 key-value heads.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.02,
}
LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "head_dim": 8}
LLAMA_4 = {**LLAMA, "torch_dtype": "float32", "transformers_version": "4.46.0", "use_cache": True, "pretraining_tp": 1}
MISTRAL = {**SIZES, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu"}
QWEN2 = {**SIZES, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "head_dim": 8}
QWEN3 = {**SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "head_dim": 8}
GEMMA2 = {
    **SIZES,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 7,
    "query_pre_attn_scalar": 13,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.5, 2.5, 4.5, 9.5]

CASES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_4, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False},
    "llama_tied": {  # no grouping, and a head size that follows from the others
        **LLAMA_4,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "num_attention_heads": 5,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama_linear": {**LLAMA_4, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama_dynamic": {
        **LLAMA_4,
        "max_position_embeddings": 17,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "factor": 3.0},
    },
    "llama_llama3": {
        **LLAMA_4,
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 37,
        },
    },
    "llama_yarn": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn_mscale": {
        **LLAMA_4,
        "rope_theta": 100.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.9,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    },
    "llama_longrope": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**MISTRAL, "rope_theta": 100.0, "sliding_window": 7, "head_dim": 8},
    "mistral_no_window": {
        **MISTRAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "sliding_window": None,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "qwen2": {**QWEN2, "rope_theta": 1000.0, "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
    "qwen2_window": {
        **QWEN2,
        "rope_theta": 1000.0,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "tie_word_embeddings": True},
    "qwen3_window": {
        **QWEN3,
        "rope_theta": 1000.0,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {**GEMMA2, "rope_theta": 100.0},
    "gemma2_no_caps": {
        **GEMMA2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
}


def randomise(model: Any, seed: int) -> None:
    """Every parameter random: matrices keep the size of what passes through them, norms and biases vary by 0.3."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            sharper = 1.5 if "q_proj" in name or "k_proj" in name else 1.0  # or attention would be nearly uniform
            # A tied embedding has to be small, or every token is followed by itself.
            embedding_size = 0.1 if model.config.tie_word_embeddings else 0.5
            size = embedding_size if "embed" in name else sharper / math.sqrt(parameter.shape[1])
            parameter.data = noise * size * (3.0 if "lm_head" in name else 1.0)
        else:
            around = 1.0 if "norm" in name and model.config.model_type != "gemma2" else 0.0
            parameter.data = around + 0.3 * noise


def run_alone(folder: Path, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits [T, V] of one prompt, its greedy continuation [24], and the smallest gap between two largest logits.

    The model is loaded anew: transformers' dynamic scaling remembers the longest row it has seen.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
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
    top = torch.cat(output.logits).topk(2, dim=-1).values
    return logits, output.sequences[0, len(prompt) :].numpy(), float((top[:, 0] - top[:, 1]).min())


def write_case(name: str, config: dict[str, Any]) -> None:
    """One folder of tests/golden, with the first seed whose greedy choices are all clear and varied."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for seed in range(100):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        randomise(model, seed)
        tensors = {key: value.contiguous() for key, value in model.named_parameters()}  # a tied head only once
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        generator = np.random.default_rng(seed)
        rows = [generator.integers(0, config["vocab_size"], length) for length in PROMPT_LENGTHS]
        results = [run_alone(folder, row) for row in rows]
        gap = min(result[2] for result in results)
        variety = [len(set(result[1].tolist())) for result in results]
        if gap > MIN_GAP and min(variety) >= MIN_DISTINCT:
            break
    else:
        raise RuntimeError(f"{name}: no seed with gaps above {MIN_GAP} and {MIN_DISTINCT} different tokens per row")
    tokens = np.zeros((len(rows), max(PROMPT_LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, config["vocab_size"]), np.float32)
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        tokens[index, : len(row)] = row
        logits[index, : len(row)] = result[0]
    generated = np.stack([result[1] for result in results]).astype(np.int32)
    np.savez(folder / "golden.npz", tokens=tokens, length=np.int32(PROMPT_LENGTHS), logits=logits, generated=generated)
    print(f"{name:18} seed {seed:2} gap {gap:.4f} logits up to {np.abs(logits).max():5.2f} distinct tokens {variety}")


def main() -> None:
    for name, config in CASES.items():
        write_case(name, config)
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(f"{len(CASES)} cases, {size / 1e6:.2f} MB in {GOLDEN}")


if __name__ == "__main__":
    main()
