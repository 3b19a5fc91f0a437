"""Defines `ModelSource`, where a model comes from: a Hugging Face folder (or one with Orbax arrays), or GGUF files.

Whatever reads a model asks its source for small files by name, for its tensors by Hugging Face's names, and for its
tokenizer. A GGUF file has all of these in a form of its own, and presents it as a folder would have it.
"""

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from decodax.models.checkpoints.adapter_files import SETTINGS_FILE
from decodax.models.checkpoints.convert_target import MANIFEST
from decodax.models.checkpoints.gguf.files import SUFFIX, find_gguf
from decodax.models.checkpoints.gguf.header import is_gguf
from decodax.models.checkpoints.gguf.source import GGUFSource
from decodax.models.checkpoints.model_files import find_file, has_orbax_arrays, read_json_bytes
from decodax.models.checkpoints.model_weights import model_weight_files, open_model_weights
from decodax.models.checkpoints.orbax_files import FOLDER, regular_files
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.tokenizers.tokenizer import Tokenizer

_SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")  # the tokenizer, generation settings
_NOT_SMALL = {"config.json", MANIFEST, SETTINGS_FILE}  # an adapter's weights are not copied either


@runtime_checkable
class ModelSource(Protocol):
    """Where a model comes from.

    path: the folder or file that the user named.
    Its methods raise ValueError for a damaged source, and FileNotFoundError for a missing file.
    """

    @property
    def path(self) -> Path: ...

    def where(self, name: str) -> str:
        """The small file's name in messages."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of a small file of a Hugging Face folder, such as config.json; None if the source has none."""
        ...

    def small_files(self) -> tuple[str, ...]:
        """The names of the small files beside config and weights: those of the tokenizer, generation settings.

        Raises ValueError for a link out of the model's folder, and for what is no regular file.
        """
        ...

    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        ...

    def holds_weights(self) -> bool:
        """Whether there are weights, or some of them; a folder with the config alone has none."""
        ...

    def tensors(self) -> Mapping[str, Entry]:
        """The stored tensors by name, in the order of the files; their numbers are read later."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if the source has none."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """A folder in Hugging Face's form, or with Orbax arrays in place of its weights."""

    path: Path

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        file = find_file(self.path, name)
        return None if file is None else read_json_bytes(file)

    def small_files(self) -> tuple[str, ...]:
        names = {entry.name for entry in os.scandir(self.path) if not entry.is_dir()}
        found = {name for pattern in _SMALL for name in fnmatch.filter(names, pattern)} - _NOT_SMALL
        files = (find_file(self.path, name) for name in sorted(found) if not name.endswith(".index.json"))
        return tuple(file.name for file in files if file is not None)

    def weight_files(self) -> list[Path]:
        if has_orbax_arrays(self.path):
            return [self.path / FOLDER / name for name in sorted(regular_files(self.path))]
        return model_weight_files(self.path)

    def holds_weights(self) -> bool:
        names = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
        return has_orbax_arrays(self.path) or any(any(self.path.glob(name)) for name in names)

    def tensors(self) -> Mapping[str, Entry]:
        return open_model_weights(self.path)

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.path)


def source_of(place: "Path | ModelSource") -> ModelSource:
    """The source of the model in a folder or a GGUF file.

    A folder without other weights may hold the GGUF file of one model.
    """
    if not isinstance(place, Path):
        return place
    if is_gguf_path(place):
        return GGUFSource(place, place)
    others = ("*.safetensors", "pytorch_model*.bin")
    if place.is_dir() and not has_orbax_arrays(place) and not any(any(place.glob(name)) for name in others):
        found = find_gguf(place)
        if found is not None:
            return GGUFSource(place, found)
    return FolderSource(place)


def is_gguf_path(path: Path) -> bool:
    """Whether a path is that of a file in GGUF, or says so."""
    return path.is_file() and (path.suffix == SUFFIX or is_gguf(path))
