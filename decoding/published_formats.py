"""Reads published auxiliary weights: Medusa heads, and the prompt tokens of parallel prompt decoding.

The formats are those that FasterDecoding/Medusa (`medusa/train/train_legacy.py`, `medusa/model/medusa_model.py`) and
hmarkc/parallel-prompt-decoding (`prompt/model/model.py`, saved by the PEFT library) write. The result is an
`AuxiliaryWeights`, to be passed as `draft=` or kept with `write_auxiliary_weights`. Only PyTorch, if it is installed,
reads pickled files (`.pt`, `.bin`), restricted to tensors.

    decodax.generate(lm, prompt, strategy="medusa", draft=load_medusa(folder, lm))
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from decodax.core.printable import printable, printable_list
from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.checkpoints.weight_formats import read_floats, require_finite
from decodax.models.medusa_heads import check_heads
from decodax.models.model import Params

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
SETTINGS_FILE = "adapter_config.json"
PROMPT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Accuracy of the r-th token at each distance, where it was not measured: what the published trees for PPD on Vicuna-7B
# imply (`prompt/inference/dynamic_sparse_trees_3_vicuna_7b.py`); the last line holds for all further distances.
PUBLISHED_ACCURACY = (
    (0.483, 0.143, 0.074, 0.045, 0.031, 0.022, 0.017, 0.013, 0.009, 0.008),
    (0.263, 0.146, 0.081, 0.058, 0.043, 0.032, 0.026, 0.022, 0.019, 0.016),
    (0.164, 0.118, 0.081, 0.058, 0.046, 0.037, 0.031, 0.023, 0.024, 0.018),
)


def load_medusa(
    folder: str | Path, lm: "LanguageModel", rank_accuracy: Sequence[Sequence[float]] | None = None
) -> AuxiliaryWeights:
    """Reads Medusa heads from a folder with `config.json` and `medusa_lm_head.safetensors` (or `.pt`).

    The file names a head's weights "{head}.{block}.linear.weight", "{head}.{block}.linear.bias" and
    "{head}.{number of blocks}.weight". All heads in the file are read: published configs name fewer.

    rank_accuracy: how often the r-th token of each head is right, by which the tree is chosen
        (`training.medusa.measured_heads` measures it); by default what was published for another model.
    Raises FileNotFoundError for missing files.
    Raises ImportError where a `.pt` file needs PyTorch.
    Raises ValueError for names or sizes that do not fit each other or the model.
    """
    path = _folder(folder)
    config = _json(path / "config.json")
    tensors = _tensors(path, MEDUSA_FILES)
    num_heads = len({name.split(".")[0] for name in tensors if re.match(r"[0-9]{1,9}\.", name)})
    num_blocks = _count(path / "config.json", config, "medusa_num_layers", 1, most=max(1, len(tensors)))
    named = _count(path / "config.json", config, "medusa_num_heads", num_heads)
    if not 1 <= named <= num_heads:
        raise ValueError(f"{path} names {named} heads in config.json, and its weights hold {num_heads}")
    expected = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            for kind in ("weight", "bias"):
                expected[f"{head}.{block}.linear.{kind}"] = (f"head_{head}", f"block_{block}", kind)
        expected[f"{head}.{num_blocks}.weight"] = (f"head_{head}", "out")
    _check_names(path, set(expected), set(tensors), f"{num_heads} heads of {num_blocks} blocks")
    heads: Params = {}
    for name, (*nodes, leaf) in expected.items():
        subtree = heads
        for node in nodes:
            subtree = subtree.setdefault(node, {})
        subtree[leaf] = jnp.asarray(tensors[name]).astype(lm.dtype)
    _check_ranks(path, heads)
    check_heads(lm.model, heads)
    shape = {"heads": num_heads, "blocks": num_blocks, "tied": False}
    facts = _facts(lm, shape, config, rank_accuracy, num_heads)
    return AuxiliaryWeights("medusa", {"heads": heads}, facts, path.name)


def load_prompt_tokens(
    path: str | Path, lm: "LanguageModel", rank_accuracy: Sequence[Sequence[float]] | None = None
) -> AuxiliaryWeights:
    """Reads prompt tokens from a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    The tensor "prompt_embeddings" [m n, D] holds the n embeddings of each of m distances one after the other; the
    config gives m (`num_special_tokens`) and n (`virtual_tokens_per_special_token`). `path` may also be the weights
    file; without a config beside it, it is read as one embedding per distance. The authors' variants (a head, prefixes,
    weighted averages, exits from several layers, ensembles that attend to each other) are rejected.

    rank_accuracy, errors: as in `load_medusa`.
    """
    given = Path(path).expanduser()
    folder, files = (given.parent, (given.name,)) if given.is_file() else (_folder(given), PROMPT_FILES)
    has_config = find_file(folder, SETTINGS_FILE) is not None
    config = _json(folder / SETTINGS_FILE) if has_config or not given.is_file() else {}
    tensors = _tensors(folder, files)
    _check_names(folder, {"prompt_embeddings"}, set(tensors), "prompt tokens")
    embedding = tensors["prompt_embeddings"]
    width = lm.config.hidden_size
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(
            f"prompt tokens must have the model's hidden size, [rows, {width}], got {list(embedding.shape)} in "
            f"{folder}: were they trained for another model?"
        )
    distances = _count(folder / SETTINGS_FILE, config, "num_special_tokens", len(embedding))
    ensemble = _count(folder / SETTINGS_FILE, config, "virtual_tokens_per_special_token", 1)
    if distances * ensemble != len(embedding):
        raise ValueError(f"{folder} names {distances} distances of {ensemble} embeddings, and holds {len(embedding)}")
    _reject_variants(folder, config, ensemble)
    params = {"embedding": jnp.asarray(embedding).astype(lm.dtype).reshape(distances, ensemble, width)}
    shape = {"distances": distances, "ensemble": ensemble}
    return AuxiliaryWeights("ppd", params, _facts(lm, shape, config, rank_accuracy, distances), folder.name)


def _reject_variants(folder: Path, config: dict[str, Any], ensemble: int) -> None:
    """Raises ValueError for prompt tokens that need more than their embeddings."""
    plain: dict[str, tuple[Any, ...]] = {
        "use_custom_lm_head": (False,),
        "use_prefix_tuning": (False,),
        "num_exits": (1,),
        "aggregation_type": ("mean",),
        # A single embedding per distance attends to the same keys in all three modes but "encoder", in which it does
        # not attend to the distances before it.
        "vt_attention_type": ("ensemble", "decoder") if ensemble == 1 else ("ensemble",),
    }
    for name, allowed in plain.items():
        if name in config and config[name] not in allowed:
            found = printable(repr(config[name]))
            raise ValueError(f"{folder} has {name} {found}, and only {allowed} can be decoded here")


def _facts(
    lm: "LanguageModel",
    shape: dict[str, Any],
    config: dict[str, Any],
    rank_accuracy: Sequence[Sequence[float]] | None,
    distances: int,
) -> dict[str, Any]:
    """The facts of auxiliary weights that are known for published ones."""
    table = PUBLISHED_ACCURACY if rank_accuracy is None else rank_accuracy
    if rank_accuracy is not None and len(rank_accuracy) != distances:
        raise ValueError(f"rank_accuracy must have one row per distance, {distances}, got {len(rank_accuracy)}")
    accuracy = [list(map(float, table[min(index, len(table) - 1)])) for index in range(distances)]
    return {
        "target_vocab_size": lm.config.vocab_size,
        "target_hidden_size": lm.config.hidden_size,
        "target_layers": lm.config.num_layers,
        "published": {"rank_accuracy": accuracy},
        "about": {"shape": shape},
        "published_for": config.get("base_model_name_or_path", ""),
    }


def _folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return path


def _json(file: Path) -> dict[str, Any]:
    if find_file(file.parent, file.name) is None:
        raise FileNotFoundError(f"{file.parent} holds no {file.name}: give the folder as it was published")
    return read_json_object(file)


def _count(file: Path, config: dict[str, Any], name: str, default: int, most: int = 2**31) -> int:
    """A field that is a count. Raises ValueError, naming it, where it is not."""
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} in {file} must be a whole number in 1..{most}, got {printable(repr(value))}")
    return value


def _tensors(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors of the first of these files that exists, in float32."""
    file = next((file for name in names if (file := find_file(folder, name)) is not None), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")
    if file.suffix == ".safetensors":
        return read_floats(file, np.float32)
    tensors = _unpickled(file)
    for name, array in tensors.items():
        require_finite(array, name, file)
    return tensors


def _unpickled(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a pickled file, in float32; PyTorch rejects all but tensors, so no code runs."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{file} is a pickled file, which only PyTorch may open: pip install torch, or convert it to safetensors"
        ) from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in content.items()}
    except Exception as error:  # a damaged or foreign pickle may raise anything
        raise ValueError(f"{file} cannot be read as tensors alone: {printable(error)}") from error


def _check_names(folder: Path, expected: set[str], found: set[str], what: str) -> None:
    if expected != found:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ValueError(
            f"{folder} must hold the weights of {what}; missing: {printable_list(missing) or 'none'}; unknown: "
            f"{printable_list(unknown) or 'none'}"
        )


def _check_ranks(folder: Path, heads: Params) -> None:
    """Raises ValueError for weights that are not matrices or biases that are not vectors."""
    for name, head in heads.items():
        for block, weights in head.items():
            leaves = {"weight": weights} if block == "out" else weights
            for kind, leaf in leaves.items():
                if leaf.ndim != (1 if kind == "bias" else 2):
                    raise ValueError(f"{folder}: {name}.{block}.{kind} has the shape {leaf.shape}")
