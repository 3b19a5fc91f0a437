"""Writes a model folder that compiles quickly, whose heads divide over eight devices, with the demo's tokenizer."""

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, FEED_FORWARD, VOCABULARY, LAYERS = 40, 8, 4, 6, 56, 4096, 2
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_SIZE,
    "intermediate_size": FEED_FORWARD,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def write_small_model(folder: Path) -> Path:
    """Random weights of a size that makes logits some units apart, so that sums in another order change no token."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2 / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN) * 4,
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
        for projection, heads in (("q", HEADS), ("k", KEY_VALUE_HEADS), ("v", KEY_VALUE_HEADS)):
            tensors[f"{name}.self_attn.{projection}_proj.weight"] = random(heads * HEAD_SIZE, HIDDEN)
        tensors[f"{name}.self_attn.o_proj.weight"] = random(HIDDEN, HEADS * HEAD_SIZE)
        tensors[f"{name}.mlp.gate_proj.weight"] = random(FEED_FORWARD, HIDDEN)
        tensors[f"{name}.mlp.up_proj.weight"] = random(FEED_FORWARD, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = random(HIDDEN, FEED_FORWARD)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    shutil.copy(str(resources.files("decodax.models.demo") / "tokenizer.json"), folder / "tokenizer.json")
    return folder
