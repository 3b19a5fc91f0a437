"""Writes tests/golden_adapters/: random LoRA adapters of the golden models, as the PEFT library saves them.

    pip install torch transformers peft
    python -m decodax.scripts.make_golden_adapters [CASE ...]

Each case is a folder with the adapter, and golden.npz: tokens [B, T] and the logits [B, T, V] of the model with the
adapter beside its weights (float32, on CPU), and the last rows of the tensors that `merge_and_unload` changed in the
last layer and around the layers, by name. base.json names the model in tests/golden/.
"""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
GOLDEN = TESTS / "golden_adapters"
LAST_ROWS = 11  # of a merged matrix, which are stored

# Model, and fields of LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {r"layers\.1\..*v_proj": 11, "k_proj": 2},
        },
    ),
    "rank_stabilised": (
        "llama",
        {
            "r": 5,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": r".*layers\.\d+\.self_attn\.(q|o)_proj",
            "modules_to_save": ["lm_head", "norm", "post_attention_layernorm"],
        },
    ),
    "tied_embedding": ("llama_tied", {"r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "o_proj"]}),
    "tied_head": (
        "llama_tied",
        {"r": 2, "lora_alpha": 5, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    ),
    "transposed": (
        "gpt2",
        {
            "r": 3,
            "lora_alpha": 4,
            "fan_in_fan_out": True,
            "target_modules": ["c_attn", "c_fc", "c_proj"],
            "bias": "lora_only",
        },
    ),
    "fused": ("phi3", {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}),
    "some_layers": (
        "mixtral",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 2],
            "exclude_modules": ["layers.2.self_attn.v_proj"],
        },
    ),
    "stacked_experts": (
        "mixtral",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "separate_experts": (
        "qwen3_moe",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one_stack": (
        "gpt_oss",
        {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "pickled": ("llama", {"r": 2, "lora_alpha": 3, "target_modules": ["v_proj"], "bias": "all"}),
    "second": ("llama", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate_proj"]}),
}


def randomised(model: Any, seed: int) -> None:
    """Gives everything that PEFT would train random numbers that change the logits clearly."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def make(case: str, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, options = CASES[case]
    folder = GOLDEN / case
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(TESTS / "golden" / base, dtype=torch.float32)
    model.eval()
    model.set_experts_implementation("eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 7)))
    with torch.no_grad():
        plain = model(tokens).logits
        adapted = get_peft_model(model, LoraConfig(**options))
        randomised(adapted, seed)
        adapted.eval()
        logits = adapted(tokens).logits
        assert (logits - plain).abs().max() > 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.save_pretrained(folder, safe_serialization=case != "pickled")
        merged = adapted.merge_and_unload()
    last = f".{model.config.num_hidden_layers - 1}."
    changed = {
        name: tensor.numpy()[..., -LAST_ROWS:, :] if tensor.ndim > 1 else tensor.numpy()
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, before[name]) and (last in name or not re.search(r"\.\d+\.", name))
    }
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": f"org/{base}"}
    for name, value in settings.items():  # sets have another order in every process
        is_set = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        settings[name] = sorted(value) if is_set else value
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "base.json").write_text(json.dumps(base) + "\n")
    np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy(), logits=logits.numpy(), **changed)
    print(case, sorted(changed), sum(file.stat().st_size for file in folder.iterdir()))


if __name__ == "__main__":
    for number, name in enumerate(CASES):
        if name in sys.argv[1:] or not sys.argv[1:]:
            make(name, number)
