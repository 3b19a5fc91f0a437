"""Copies golden model folders for damaging, and checks whether what loads is still the same model.

Two models with equal configs and bit-identical weights have equal logits, so the cases compile nothing;
`tests/decoding/test_golden.py` shows that a golden folder itself gives the right logits.
"""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decodax.models.load import LanguageModel, load
from tests.fuzz.damage import Allowed
from tests.fuzz.verdict import WrongResult
from tests.golden_files import golden_cases

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "model.safetensors"


@cache
def config_of(base: str) -> dict[str, Any]:
    """The config.json of a golden folder."""
    return json.loads((GOLDEN / base / "config.json").read_text(encoding="utf-8"))


def one_of_each_family() -> list[str]:
    """The first golden folder of each family."""
    first: dict[str, str] = {}
    for base in golden_cases():
        first.setdefault(config_of(base)["model_type"], base)
    return list(first.values())


def copy_of(base: str, folder: Path) -> Path:
    """A copy of a golden folder, made once in `folder`."""
    copied = folder / base
    if not copied.exists():
        copied.mkdir(parents=True)
        for name in ("config.json", WEIGHTS):
            shutil.copyfile(GOLDEN / base / name, copied / name)
    return copied


@cache
def golden_model(base: str) -> LanguageModel:
    """The undamaged model."""
    return load(GOLDEN / base)


def differences(model: LanguageModel, other: LanguageModel) -> list[str]:
    """Differences of two loaded models: fields of their configs, and weights."""
    found = []
    if model.config != other.config:
        fields = [name for name in vars(model.config) if getattr(model.config, name) != getattr(other.config, name)]
        found.append(f"config: {', '.join(fields)}")
    leaves, others = (jax.tree_util.tree_leaves_with_path(one.params) for one in (model, other))
    if [path for path, _ in leaves] != [path for path, _ in others]:
        return [*found, "names of weights"]
    for (path, leaf), (_, wanted) in zip(leaves, others, strict=True):
        if not same_bits(leaf, wanted):
            found.append(f"weights of {jax.tree_util.keystr(path)}")
    return found


def same_bits(array: Any, other: Any) -> bool:
    """Whether two arrays are bit-identical."""
    first, second = np.asarray(array), np.asarray(other)
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def check_loads(folder: Path, right: LanguageModel, allowed: Allowed) -> LanguageModel:
    """Loads a damaged folder; raises WrongResult for what `allowed` does not allow, besides the errors of `load`."""
    try:
        loaded = load(folder)
    except Exception as error:
        if allowed is Allowed.HARMLESS:
            raise WrongResult(f"refused, and nothing was damaged: {error}") from error
        raise
    if allowed is Allowed.NOTHING:
        raise WrongResult("loaded, and should have been refused")
    if allowed is not Allowed.OTHER and (found := differences(loaded, right)):
        raise WrongResult(f"loaded as another model ({'; '.join(found[:4])})")
    return loaded


def read_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """The inverse; the header is padded to a multiple of eight bytes, as the format requires."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def tensors_of(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a safetensors file: name -> (kind, shape, bytes)."""
    header, data = read_safetensors(content)
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


def packed(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of these tensors, in this order."""
    header, data = {}, b""
    for name, (kind, shape, numbers) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    return write_safetensors(header, data)
