"""Writes a trained model as a Hugging Face folder, so that `decodax.load` and transformers can read it.

Every file is written under another name and then moved: a reader finds the old file or the new one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from decodax.models.configs.hf_config import read_config
from decodax.models.model import Params


def write_model(folder: Path, config: Mapping[str, Any], params: Params, dtype: DTypeLike) -> None:
    """Writes `model.safetensors`, then `config.json`, with Hugging Face's tensor names.

    config: the fields of a `config.json` that decodax reads.
    params: nested as its `weights()`.
    dtype: what the weights are rounded to.
    Raises ValueError for a config that decodax does not read.
    """
    family, model_config = read_config(config)
    tensors = {}
    for name, path in family.tensor_names(model_config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        tensors[name] = np.asarray(leaf).astype(jnp.dtype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.chmod(temporary, 0o644)
    os.replace(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", {**config, "torch_dtype": jnp.dtype(dtype).name})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object, replacing the file atomically."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
