"""What both directions of converting a model share: where weights are read from, what stands beside them, the manifest.

A source is a folder that `decodax.load` takes, of either kind, or a loaded model. Weights keep the type in which they
are stored; quantised ones (FP8, mxfp4) become float32, which holds their numbers exactly, or the type asked for.
"""

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike

from decodax.arguments import folder_name
from decodax.layers.weight import Weight
from decodax.models.adapter_files import SETTINGS_FILE
from decodax.models.checkpoint import Progress, StoredWeights, flat_weights, open_params
from decodax.models.config import ModelConfig
from decodax.models.convert_target import MANIFEST, Target, check_place, read_manifest, sources_of, written_files
from decodax.models.families._contract import HEAD_NAME, Family, ParameterPath
from decodax.models.hf_config import load_config
from decodax.models.layouts import REDUNDANT_SUFFIXES
from decodax.models.load import LanguageModel, find_folder, working_dtype
from decodax.models.model_files import find_file, parse_json_object, printable
from decodax.models.next_layer import PART, holds_next_layer, open_next_layer
from decodax.models.orbax_arrays import has_arrays
from decodax.models.orbax_files import FOLDER, regular_files
from decodax.models.sources import Layouts, Region, region_shape, whole_region
from decodax.models.staged_folder import StagedFolder, forget_partial, partial_of, staged
from decodax.models.stored_files import weight_files
from decodax.models.stored_formats import scales_of

_VERSION = 1  # of the manifest
_BESIDE = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")  # the tokenizer, the settings of generation
_NOT_BESIDE = {"config.json", MANIFEST, SETTINGS_FILE}  # an adapter's weights are not copied either


@runtime_checkable
class Weights(Protocol):
    """Parameters that can be read region by region (`StoredWeights`, `HeldWeights`)."""

    @property
    def weights(self) -> Mapping[ParameterPath, Weight]: ...

    def dtype(self, path: ParameterPath) -> np.dtype: ...

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class HeldWeights:
    """The parameters of a loaded model."""

    weights: Mapping[ParameterPath, Weight]
    leaves: Mapping[ParameterPath, jax.Array]

    def dtype(self, path: ParameterPath) -> np.dtype:
        return np.dtype(self.leaves[path].dtype)

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        """A host copy of a region, which nobody keeps: an array remembers its own."""
        leaf = self.leaves[path]
        starts = [part.start for part in region]
        is_whole = region == whole_region(leaf.shape)
        part = leaf.copy() if is_whole else jax.lax.dynamic_slice(leaf, starts, region_shape(region))
        return np.ascontiguousarray(np.asarray(part).astype(dtype, copy=False)).reshape(region_shape(region))


class Joined:
    """A model's parameters and those of a layer behind it."""

    def __init__(self, *parts: Weights) -> None:
        self._part = {path: part for part in parts for path in part.weights}
        self.weights = {path: weight for part in parts for path, weight in part.weights.items()}

    def dtype(self, path: ParameterPath) -> np.dtype:
        return self._part[path].dtype(path)

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        return self._part[path].read(path, region, dtype)


@dataclass(frozen=True, eq=False)
class Source:
    """What is converted.

    folder: where its config and tokenizer are. layouts: where its parameters stand in safetensors.
    files: sizes in bytes and times of change of the files of its weights; None: it was a loaded model.
    left_out: stored tensors that belong to parts which decodax does not read.
    stored: those of the weights that are read from files.
    """

    folder: Path
    family: Family
    config: ModelConfig
    weights: Weights
    layouts: Mapping[ParameterPath, Layouts]
    files: Mapping[str, Any] | None
    left_out: tuple[str, ...] = ()
    stored: tuple[StoredWeights, ...] = ()

    def dtypes(self, dtype: DTypeLike | None) -> dict[ParameterPath, np.dtype]:
        """In which type each parameter is written; ValueError for a type that models are not kept in."""
        chosen = None if dtype is None else np.dtype(working_dtype(dtype))
        return {path: chosen or self.weights.dtype(path) for path in self.weights.weights}


def open_source(source: Any) -> Source:
    """Reads what a source holds, without its numbers. The errors are those of `decodax.load`."""
    if isinstance(source, LanguageModel):
        folder = source.path
    else:
        folder = find_folder(folder_name("source", source, ", the id of a model on the hub, or a loaded model"))
    family, config = load_config(folder)
    model = _held(source, config) if isinstance(source, LanguageModel) else open_params(folder, family, config)
    layouts, behind = family.layouts(config), None
    if family.next_layer is not None and holds_next_layer(folder, family, config):
        behind = open_next_layer(folder, family, config)
        layouts |= {(PART, *path): stored for path, stored in family.next_layer_layouts(config).items()}
    weights = model if behind is None else Joined(model, behind)
    if isinstance(model, HeldWeights):
        return Source(folder, family, config, weights, layouts, None, (), () if behind is None else (behind,))
    files = (
        [folder / FOLDER / name for name in sorted(regular_files(folder))]
        if has_arrays(folder)
        else weight_files(folder)
    )
    stored = (model,) if behind is None else (model, behind)
    return Source(folder, family, config, weights, layouts, _stamps(folder, files), _left_out(stored, family), stored)


def _left_out(parts: Sequence[StoredWeights], family: Family) -> tuple[str, ...]:
    """The tensors that no part holds, but for copies and what is derived from the config."""
    stored = parts[0].stored
    known = {source.name for part in parts for filled in part.filled.values() for source, _ in filled}
    known |= {scales for name in known if (scales := scales_of(name, stored)) is not None}
    known |= {HEAD_NAME, parts[0].names.in_file(HEAD_NAME)}
    copies = rf".*\.(?:{family.next_layer.copies})" if family.next_layer is not None and len(parts) > 1 else "(?!)"
    return tuple(
        name
        for name in stored
        if name not in known and not name.endswith(REDUNDANT_SUFFIXES) and not re.fullmatch(copies, name)
    )


def _held(lm: LanguageModel, config: ModelConfig) -> HeldWeights:
    weights = flat_weights(config.weights())
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)}
    if lm.model.config != config or set(leaves) != set(weights):
        raise ValueError(
            f"the model is no longer the one that {lm.path} describes (other layers, weights, or places of experts): "
            "convert it as it was loaded"
        )
    if not all(leaf.is_fully_addressable for leaf in leaves.values()):
        raise ValueError("some weights lie on devices of other processes: convert the folder that they came from")
    return HeldWeights(weights, leaves)


def _stamps(folder: Path, files: list[Path]) -> dict[str, Any]:
    stamps = {}
    for file in files:
        if file.is_file():
            status = file.stat()
            name = str(file.relative_to(folder))
            stamps[name] = {"num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    return stamps


def manifest(
    source: Source, dtypes: Mapping[ParameterPath, np.dtype], form: str, weights: Iterable[str], **more: Any
) -> dict[str, Any]:
    """What a converted folder says of itself. form: "orbax" or "hf". weights: the names of what holds its weights."""
    import decodax  # late: it imports this

    sizes = {path: weight.shape for path, weight in source.weights.weights.items()}
    counts = {path: int(np.prod(shape)) for path, shape in sizes.items()}
    return {
        "manifest_version": _VERSION,
        "form": form,
        "written_by": f"decodax {decodax.__version__}",
        "num_parameters": sum(counts.values()),
        "num_bytes": sum(counts[path] * dtypes[path].itemsize for path in counts),
        "dtypes": sorted({dtype.name for dtype in dtypes.values()}),
        **more,
        "files": written_files(weights, files_beside(source.folder)),
        "source": {"name": source.folder.resolve().name, "files": source.files},
    }


def config_json(source: Source, dtypes: Mapping[ParameterPath, np.dtype]) -> bytes:
    """The source's `config.json` for weights that are plain and of these types."""
    file = source.folder / "config.json"
    content = b"" if find_file(source.folder, file.name) is None else file.read_bytes()
    config = parse_json_object(content, str(file))
    was_quantised = config.pop("quantization_config", None) is not None
    if not was_quantised and all(dtype == source.weights.dtype(path) for path, dtype in dtypes.items()):
        return content
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    config |= dict.fromkeys(names, dtypes["embedding",].name)
    return (json.dumps(config, indent=2) + "\n").encode()


def files_beside(folder: Path) -> list[Path]:
    """The small files that belong to a model beside its weights and its config.

    Raises ValueError for one that is a link out of the model's folder, or no regular file.
    """
    names = {entry.name for entry in os.scandir(folder) if not entry.is_dir()}
    found = {name for pattern in _BESIDE for name in fnmatch.filter(names, pattern)} - _NOT_BESIDE
    files = (find_file(folder, name) for name in sorted(found) if not name.endswith(".index.json"))
    return [file for file in files if file is not None]


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. resumed_bytes: of weights that an earlier, interrupted run had written; all of them where
    the target was there already."""

    target: Path
    manifest: Mapping[str, Any]
    resumed_bytes: int


Write = Callable[[StagedFolder, Callable[[int], None]], None]


def convert(
    source: Source,
    target: Path,
    description: Mapping[str, Any],
    config: bytes,
    pieces: Mapping[str, int],
    write: Write,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> Conversion:
    """Makes the target: its weights by `write`, then what stands beside them, and its config last.

    description: its manifest. pieces: the names of what `write` writes, with the bytes of each; it leaves out those
        that are `done`, and tells of each other one, with its bytes, when it is written.
    progress: called with (bytes done, bytes in all).
    """
    target = absolute_target(target)
    guard = Target(target, description["form"], sources_of(source.folder), overwrite)
    is_there = source.files is not None and not overwrite and _is_finished(target, description)
    if not is_there:
        guard.check()
    if source.left_out:
        names = ", ".join(source.left_out[:3]) + (", ..." if len(source.left_out) > 3 else "")
        warnings.warn(
            f"{len(source.left_out)} tensor(s) of {source.folder} belong to parts that decodax does not read and are "
            f"not converted: {names}",
            stacklevel=3,
        )
    total = sum(pieces.values())
    if is_there:
        forget_partial(target, guard)
        return Conversion(target, description, total)
    with staged(target, description, guard, resume=source.files is not None) as folder:
        resumed = done = sum(size for piece, size in pieces.items() if piece in folder.done)
        folder.require(total - done)

        def wrote(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        wrote(0)
        write(folder, wrote)
        for file in files_beside(source.folder):
            folder.write_file(file.name, file.read_bytes())
        folder.write_file(MANIFEST, (json.dumps(dict(description), indent=2) + "\n").encode())
        folder.write_file("config.json", config)
    for part in source.stored:
        part.warn(stacklevel=3)
    return Conversion(target, description, resumed)


def absolute_target(target: Any) -> Path:
    """The target with a name of its own; ValueError for what is no path, else the errors are those of `check_place`."""
    named = Path(folder_name("target", target))
    try:
        named = named.expanduser()
    except RuntimeError as error:  # a home that nobody knows
        raise ValueError(f"{printable(named)} cannot be written: {printable(error)}") from None
    # Links and ".." on the way to it are followed, once and for all; itself it may not be a link.
    named = named.resolve() if named.name in ("", "..") else named.absolute().parent.resolve() / named.name
    check_place(named)
    folder_name("target", partial_of(named))  # which has a longer name
    return named


def _is_finished(target: Path, description: Mapping[str, Any]) -> bool:
    """Whether this very conversion is there, with all its files."""
    return read_manifest(target) == description and all((target / name).exists() for name in description["files"])
