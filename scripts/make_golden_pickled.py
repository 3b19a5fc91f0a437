"""Writes tests/golden_pickled/: tiny random llamas as `torch.save` stores them, and their numbers.

    pip install torch
    python -m decodax.scripts.make_golden_pickled

single: a state dictionary with `_metadata`, parameters, several dtypes, one storage shared by three tensors, a
    transposed tensor, and a tensor that is every second row of its storage.
shards: two files and their index.
legacy.bin: the form before PyTorch 1.6, which is refused.
Each folder has numbers.npz, the float32 numbers of every tensor as PyTorch sees them.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from decodax.scripts.make_golden_formats import config_of, shapes_of

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden_pickled"
LAYER = "model.layers.0"


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> OrderedDict[str, Any]:
    import torch

    rng = np.random.default_rng(11)
    state = OrderedDict(
        (name, torch.from_numpy(rng.standard_normal(shape).astype(np.float32))) for name, shape in shapes.items()
    )
    rows = torch.from_numpy(rng.standard_normal((28, 28)).astype(np.float32))
    shared = torch.from_numpy(rng.standard_normal(2 * 28 * 28).astype(np.float32))
    state |= {
        f"{LAYER}.self_attn.q_proj.weight": shared[:784].view(28, 28),
        f"{LAYER}.self_attn.o_proj.weight": shared[784:].view(28, 28),
        "lm_head.weight": state["model.embed_tokens.weight"],  # tied
        f"{LAYER}.mlp.down_proj.weight": state[f"{LAYER}.mlp.down_proj.weight"].t().contiguous().t(),
        f"{LAYER}.self_attn.k_proj.weight": rows[::2],
        f"{LAYER}.self_attn.v_proj.weight": state[f"{LAYER}.self_attn.v_proj.weight"].to(torch.bfloat16),
        f"{LAYER}.mlp.up_proj.weight": torch.nn.Parameter(state[f"{LAYER}.mlp.up_proj.weight"].half()),
        "model.norm.weight": state["model.norm.weight"].double(),
        f"{LAYER}.input_layernorm.weight": torch.cat([state[f"{LAYER}.input_layernorm.weight"]] * 2)[::2],
    }
    state._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict has it
    return state


def main() -> None:
    import torch

    config = config_of(28, 41, {"bits": 0})
    del config["quantization"]
    state = tensors_of(shapes_of(config))
    names = list(state)
    files = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for folder in ("single", "shards"):
        target = GOLDEN / folder
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        numbers = {name: tensor.detach().float().numpy() for name, tensor in state.items() if name != "lm_head.weight"}
        np.savez_compressed(target / "numbers.npz", **numbers)
    torch.save(state, GOLDEN / "single" / "pytorch_model.bin")
    for file, content in files.items():
        torch.save({name: state[name].clone() for name in content}, GOLDEN / "shards" / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    index = {"metadata": {}, "weight_map": weight_map}
    (GOLDEN / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
    norm = {"model.norm.weight": state["model.norm.weight"]}
    torch.save(norm, GOLDEN / "legacy.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
