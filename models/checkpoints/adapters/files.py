"""Opens a LoRA adapter's folder: `adapter_config.json` with `adapter_model.safetensors` or `adapter_model.bin`.

    base_model.model.<module>.lora_A.weight           [rank, inputs]
    base_model.model.<module>.lora_B.weight           [outputs, rank]
    base_model.model.<module>.lora_embedding_A        [rank, tokens]
    base_model.model.<module>.lora_embedding_B        [width, rank]
    base_model.model.<module>.lora_A.weight           [experts * rank, inputs] of a stack of experts, expert by expert
    base_model.model.<module>.lora_B.weight           [outputs, rank * experts], all experts of the first of rank first
    base_model.model.<module>.weight, .bias           a tensor that replaces the model's (modules_to_save, bias)

PEFT's name of an adapter may follow, ".lora_A.default.weight", and ".base_layer" the module.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.adapter_files import SETTINGS_FILE, WEIGHTS_FILES
from decodax.models.checkpoints.adapters.settings import Settings, read_settings
from decodax.models.checkpoints.model_files import find_file
from decodax.models.checkpoints.pickled_files import open_pickled
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, RawTensor, open_file

_WRAPPER = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(?P<kind>weight|bias)")


@dataclass(frozen=True, eq=False)
class LowRank:
    """A module's two matrices: its weight [outputs, inputs] becomes weight + scale * up @ down.

    down, up: as stored.
    rank: of the product; where there is more of both than this, they are stacks, one pair per expert.
    is_embedding: the weight is stored as [inputs, outputs], one row per token.
    scale: of the product.
    """

    down: RawTensor
    up: RawTensor
    rank: int
    is_embedding: bool
    scale: float

    def downs(self) -> np.ndarray:
        """[experts, rank, inputs]; one expert where there are none."""
        down = self.down.array(self.down.dtype)
        return down.reshape(-1, self.rank, down.shape[1])

    def ups(self) -> np.ndarray:
        """[experts, outputs, rank]."""
        up = self.up.array(self.up.dtype)
        return up.reshape(len(up), self.rank, -1).transpose(2, 0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product, with the experts first if there are several."""
        count = self.down.shape[0] // self.rank
        return (*([count] if count > 1 else []), self.up.shape[0], self.down.shape[1])


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, not read yet.

    folder: of its files.
    settings: of the adapter.
    low_rank: the matrices of modules, by the name of the tensor that they change.
    whole: the tensors that replace the model's, by name.
    """

    folder: Path
    settings: Settings
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, RawTensor]

    @property
    def tensor_names(self) -> set[str]:
        """The names of the model's tensors that it changes."""
        return {*self.low_rank, *self.whole}

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / SETTINGS_FILE, weights_file(self.folder)

    @property
    def origin(self) -> str:
        """Text for the end of a message."""
        base = self.settings.base
        named = "" if base is None else f" ({SETTINGS_FILE} names {printable(base)})"
        return f"was it trained for another model{named}?"


def weights_file(folder: Path) -> Path:
    """The file of an adapter's tensors; FileNotFoundError if there is none."""
    found = next(filter(None, (find_file(folder, name) for name in WEIGHTS_FILES)), None)
    if found is None:
        raise FileNotFoundError(
            f"{printable(folder)} has neither {WEIGHTS_FILES[0]} nor {WEIGHTS_FILES[1]}: a LoRA adapter as the PEFT "
            "library saves it is expected; download the folder again, whole"
        )
    return found


def open_adapter(folder: Path) -> Adapter:
    """Opens the adapter in a folder, and checks all but whether it fits a model.

    Raises FileNotFoundError for a missing file.
    Raises ValueError for settings or tensors that are not supported, damaged, or do not fit each other.
    """
    file = find_file(folder, SETTINGS_FILE)
    if file is None:
        raise FileNotFoundError(
            f"{printable(folder)} has no {SETTINGS_FILE}: a LoRA adapter as the PEFT library saves it is expected"
        )
    settings, weights = read_settings(file), weights_file(folder)
    tensors = open_file(weights) if weights.suffix == ".safetensors" else open_pickled(weights)
    pairs: dict[str, dict[str, RawTensor]] = {}
    whole: dict[str, RawTensor] = {}
    where = printable(weights)
    for name, tensor in tensors.items():
        if tensor.kind not in PLAIN_DTYPES:
            raise ValueError(
                f"{printable(name)} in {where} must hold floating-point numbers ({', '.join(PLAIN_DTYPES)}), got "
                f"{printable(tensor.kind)}"
            )
        own = name.removeprefix(_WRAPPER)
        if matrix := _MATRIX.fullmatch(own):
            pair, kind = pairs.setdefault(matrix["module"], {}), (matrix["kind"] or "") + matrix["factor"]
            taken = pair.setdefault(kind, tensor)
        elif (one := _WHOLE.fullmatch(own)) and "lora_" not in own:
            taken = whole.setdefault(f"{one['module']}.{one['kind']}", tensor)
        else:
            raise ValueError(
                f"{printable(name)} in {where} is not understood: expected lora_A and lora_B, lora_embedding_A and "
                "lora_embedding_B, or the weight or bias of a module"
            )
        if taken is not tensor:
            raise ValueError(f"{printable(name)} in {where} is there twice, under two names: keep one")
    if not tensors:
        raise ValueError(f"{where} holds no tensors: download the adapter again")
    low_rank = {}
    for module, pair in pairs.items():
        parameter = settings.parameter_of(module)
        name = f"{module}.weight" if parameter is None else parameter
        low_rank[name] = _low_rank(module, parameter, pair, settings, where)
    return Adapter(folder, settings, low_rank, whole)


def _low_rank(
    module: str, parameter: str | None, pair: Mapping[str, RawTensor], settings: Settings, where: str
) -> LowRank:
    """The matrices of a module, or of a parameter of it, checked against the settings."""
    name = printable(module)
    is_embedding = "embedding_A" in pair
    kinds = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if set(pair) != set(kinds):
        found = " and ".join(f"lora_{kind}" for kind in sorted(pair))
        raise ValueError(
            f"{where} has {found} of {name}, expected lora_{kinds[0]} and lora_{kinds[1]}: download it again"
        )
    if parameter is None and not settings.changes(module):
        raise ValueError(
            f"{where} has matrices of {name}, which {settings.where} does not name (target_modules, exclude_modules, "
            "modules_to_save, layers_to_transform, target_parameters): take both files from one adapter"
        )
    down, up, own = pair[kinds[0]], pair[kinds[1]], parameter or module
    rank = settings.rank_of(own)
    fits = len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] == up.shape[1] > 0
    if not fits or (down.shape[0] != rank if parameter is None else down.shape[0] % rank):
        raise ValueError(
            f"{where} has lora_{kinds[0]} {list(down.shape)} and lora_{kinds[1]} {list(up.shape)} of {name}, expected "
            f"[{rank}, inputs] and [outputs, {rank}], as {settings.where} says (r, rank_pattern): take both files from "
            "one adapter"
        )
    for tensor in (down, up):
        if not np.isfinite(tensor.array(tensor.dtype)).all():
            raise ValueError(f"{tensor.label} in {where} holds NaN or infinity: train or download the adapter again")
    return LowRank(down, up, rank, is_embedding, settings.scale_of(own))
