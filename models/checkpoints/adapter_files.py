"""Detects a LoRA adapter (PEFT library) in a folder that is loaded as a model, and reports that it is not applied.

`models/checkpoints/adapters/` reads adapters.
"""

import warnings
from pathlib import Path

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import find_file, has_orbax_arrays, read_json_object
from decodax.models.checkpoints.pickled_files import PICKLE_INDEX, SINGLE_PICKLE
from decodax.models.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BASE = "base_model_name_or_path"


def refuse_adapter_alone(folder: Path) -> None:
    """Raises FileNotFoundError for a folder that has an adapter but no model weights."""
    files = _files(folder)
    if (
        files
        and not has_orbax_arrays(folder)
        and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE, SINGLE_PICKLE, PICKLE_INDEX))
    ):
        raise FileNotFoundError(
            f"{printable(folder)} holds a LoRA adapter alone ({', '.join(files)}), and no model{_base(folder)}: "
            "load the model with it, decodax.load(MODEL, adapter=FOLDER) or --model MODEL --adapter FOLDER"
        )


def warn_of_adapter(folder: Path, stacklevel: int) -> None:
    """Warns if a folder has an adapter beside its model."""
    if files := _files(folder):
        warnings.warn(
            f"the LoRA adapter in {printable(folder)} ({', '.join(files)}) is not applied, the model there is used "
            "without it: pass the folder as adapter (--adapter), too, or remove these files",
            stacklevel=stacklevel + 1,
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder has files of an adapter."""
    return bool(_files(folder))


def _files(folder: Path) -> list[str]:
    return [name for name in (SETTINGS_FILE, *WEIGHTS_FILES) if (folder / name).exists()]


def _base(folder: Path) -> str:
    """Text with the model that the adapter was trained for, if its settings name it."""
    settings = find_file(folder, SETTINGS_FILE)
    base = None if settings is None else read_json_object(settings).get(_BASE)
    return f"; it was trained for {printable(base)}" if base else ""
