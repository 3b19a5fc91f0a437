"""Converts a model between checkpoint formats: what both directions share (source weights, small files, manifest).

A source is a folder or GGUF file that `decodax.load` takes, or a loaded model. Weights keep their stored dtype;
packed ones (FP8, GPTQ, ...) become float32, which holds their numbers exactly, or the dtype asked for.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike

from decodax.core.arguments import folder_name
from decodax.core.printable import printable
from decodax.core.version import __version__
from decodax.core.weight import Weight
from decodax.models.checkpoints.adapters.source import AdaptedSource, adapted
from decodax.models.checkpoints.convert_target import (
    MANIFEST,
    Target,
    check_place,
    read_manifest,
    source_paths,
    written_files,
)
from decodax.models.checkpoints.model_files import parse_json_object
from decodax.models.checkpoints.model_source import ModelSource, source_of
from decodax.models.checkpoints.name_map import NameMaps, Region, full_region, region_shape
from decodax.models.checkpoints.name_map_selection import REDUNDANT_SUFFIXES
from decodax.models.checkpoints.reading import Progress, StoredWeights, flat_weights, open_params
from decodax.models.checkpoints.staged_folder import StagedFolder, forget_partial, partial_of, staged
from decodax.models.config import ModelConfig
from decodax.models.configs.hf_config import load_config
from decodax.models.configs.text_config import is_multimodal, text_fields
from decodax.models.families.contract import Family, ParameterPath
from decodax.models.load import LanguageModel, find_folder, working_dtype
from decodax.models.mtp_head import MTP_HEAD_KEY, holds_mtp_head, open_mtp_head

_VERSION = 1  # of the manifest


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
        """A host copy of a region, made from a temporary array: an array caches its own host copy."""
        leaf = self.leaves[path]
        starts = [bounds.start for bounds in region]
        is_full = region == full_region(leaf.shape)
        copied = leaf.copy() if is_full else jax.lax.dynamic_slice(leaf, starts, region_shape(region))
        return np.ascontiguousarray(np.asarray(copied).astype(dtype, copy=False)).reshape(region_shape(region))


class CombinedWeights:
    """A model's parameters and those of its MTP head."""

    def __init__(self, *members: Weights) -> None:
        self._member = {path: member for member in members for path in member.weights}
        self.weights = {path: weight for member in members for path, weight in member.weights.items()}

    def dtype(self, path: ParameterPath) -> np.dtype:
        return self._member[path].dtype(path)

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        return self._member[path].read(path, region, dtype)


@dataclass(frozen=True, eq=False)
class Source:
    """The model to convert.

    origin: where it comes from, with its config and tokenizer.
    family, config: of the model.
    weights: its parameters.
    name_maps: of its parameters in safetensors.
    files: sizes in bytes and modification times of the files of its weights; None: it was a loaded model.
    left_out: stored tensors that decodax does not read.
    stored: those of the weights that are read from files.
    """

    origin: ModelSource
    family: Family
    config: ModelConfig
    weights: Weights
    name_maps: Mapping[ParameterPath, NameMaps]
    files: Mapping[str, Any] | None
    left_out: tuple[str, ...] = ()
    stored: tuple[StoredWeights, ...] = ()

    def dtypes(self, dtype: DTypeLike | None) -> dict[ParameterPath, np.dtype]:
        """The dtype in which each parameter is written; ValueError for one that models are not stored in.

        A weight with a dtype of its own (`Weight.dtype`) keeps what is stored.
        """
        chosen = None if dtype is None else np.dtype(working_dtype(dtype))
        return {
            path: self.weights.dtype(path) if chosen is None or weight.dtype is not None else chosen
            for path, weight in self.weights.weights.items()
        }


def open_source(source: Any, adapters: Sequence[Path] = ()) -> Source:
    """Opens a source without reading its numbers.

    source: to convert.
    adapters: folders of LoRA adapters to merge into its weights.
    Raises what `decodax.load` raises.
    """
    if isinstance(source, LanguageModel):
        if adapters:
            raise ValueError("adapters are merged into a model that is read from files: pass its folder, not the model")
        folder = source.path
    else:
        folder = find_folder(folder_name("source", source, ", the id of a model on the hub, or a loaded model"))
    origin = source_of(folder)
    family, config = load_config(origin)
    if adapters:
        origin, config = adapted(origin, family, config, adapters)
    model = _held(source, config) if isinstance(source, LanguageModel) else open_params(origin, family, config)
    name_maps, mtp_head = family.name_maps(config), None
    if family.mtp_head is not None and holds_mtp_head(folder, family, config):
        mtp_head = open_mtp_head(folder, family, config)
        name_maps |= {(MTP_HEAD_KEY, *path): stored for path, stored in family.mtp_head_name_maps(config).items()}
    weights = model if mtp_head is None else CombinedWeights(model, mtp_head)
    if isinstance(model, HeldWeights):
        return Source(origin, family, config, weights, name_maps, None, (), () if mtp_head is None else (mtp_head,))
    files = _stamps(folder if folder.is_dir() else folder.parent, origin.weight_files())
    stored = (model,) if mtp_head is None else (model, mtp_head)
    return Source(origin, family, config, weights, name_maps, files, _left_out(stored, family), stored)


def _left_out(opened: Sequence[StoredWeights], family: Family) -> tuple[str, ...]:
    """The tensors that none of the opened weights uses, but for copies and what is derived from the config."""
    stored = opened[0].stored
    known = {
        tensor_slice.name for weights in opened for filled in weights.filled.values() for tensor_slice, _ in filled
    }
    known |= {family.outer_name("head"), opened[0].names.in_file(family.outer_name("head"))}
    copies = rf".*\.(?:{family.mtp_head.copies})" if family.mtp_head is not None and len(opened) > 1 else "(?!)"
    return tuple(
        name
        for name in stored
        if name not in known and not name.endswith(REDUNDANT_SUFFIXES) and not re.fullmatch(copies, name)
    )


def _held(lm: LanguageModel, config: ModelConfig) -> HeldWeights:
    lm.require_weights()
    weights = flat_weights(config.weights())
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)}
    if lm.model.config != config or set(leaves) != set(weights):
        raise ValueError(
            f"the model is no longer the one that {lm.path} describes (other layers, weights, or expert placement): "
            "convert it as it was loaded"
        )
    if not all(leaf.is_fully_addressable for leaf in leaves.values()):
        raise ValueError("some weights are on devices of other processes: convert the folder that they came from")
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
    """The manifest of a converted folder.

    source: the model that is converted.
    dtypes: of the written parameters.
    form: "orbax" or "hf".
    weights: the names of the files or folders that hold its weights.
    more: further fields.
    """
    sizes = {path: weight.shape for path, weight in source.weights.weights.items()}
    counts = {path: int(np.prod(shape)) for path, shape in sizes.items()}
    adapters = {"adapters": source.origin.described()} if isinstance(source.origin, AdaptedSource) else {}
    return {
        "manifest_version": _VERSION,
        "form": form,
        "written_by": f"decodax {__version__}",
        "num_parameters": sum(counts.values()),
        "num_bytes": sum(counts[path] * dtypes[path].itemsize for path in counts),
        "dtypes": sorted({dtype.name for dtype in dtypes.values()}),
        **more,
        "files": written_files(weights, source.origin.small_files()),
        "source": {"name": source.origin.path.resolve().name, "files": source.files} | adapters,
    }


def config_json(source: Source, dtypes: Mapping[ParameterPath, np.dtype]) -> bytes:
    """The source's `config.json` for plain weights of these dtypes."""
    content = source.origin.read("config.json") or b""
    whole = parse_json_object(content, source.origin.where("config.json"))
    config = dict(text_fields(whole))
    packed = [config.pop(name, None) for name in ("quantization_config", "quantization")]
    was_quantised = any(field is not None for field in packed)
    keeps_dtypes = all(dtype == source.weights.dtype(path) for path, dtype in dtypes.items())
    if keeps_dtypes and not was_quantised and not is_multimodal(whole):
        return content
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    config |= dict.fromkeys(names, dtypes["embedding",].name)
    return (json.dumps(config, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    target: the folder.
    manifest: of the folder.
    resumed_bytes: of weights that an earlier, interrupted run had written; all if the target existed already.
    """

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
    """Writes the target: its weights by `write`, then the small files, and its config last.

    source: the model to convert.
    target: the folder to write.
    description: the target's manifest.
    config: the bytes of its `config.json`.
    pieces: the names of what `write` writes, with the bytes of each.
    write: skips the pieces that are `done`, and reports the bytes of every other one when it is written.
    overwrite: whether to replace a checkpoint that is there.
    progress: called with (bytes done, bytes in all).
    """
    target = absolute_target(target)
    guard = Target(target, description["form"], source_paths(source.origin.path), overwrite)
    is_there = source.files is not None and not overwrite and _is_finished(target, description)
    if not is_there:
        guard.check()
    if source.left_out:
        names = ", ".join(source.left_out[:3]) + (", ..." if len(source.left_out) > 3 else "")
        warnings.warn(
            f"{len(source.left_out)} tensor(s) of {source.origin.path} are not read by decodax and not converted: "
            f"{names}",
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
        for name in source.origin.small_files():
            folder.write_file(name, source.origin.read(name) or b"")
        folder.write_file(MANIFEST, (json.dumps(dict(description), indent=2) + "\n").encode())
        folder.write_file("config.json", config)
    for weights in source.stored:
        weights.warn(stacklevel=3)
    return Conversion(target, description, resumed)


def absolute_target(target: Any) -> Path:
    """The target as an absolute path. Raises ValueError for what is no path, and what `check_place` raises."""
    named = Path(folder_name("target", target))
    try:
        named = named.expanduser()
    except RuntimeError as error:  # an unknown home folder
        raise ValueError(f"{printable(named)} cannot be written: {printable(error)}") from None
    # Links and ".." on the way to it are resolved here, once; the target itself must not be a link.
    named = named.resolve() if named.name in ("", "..") else named.absolute().parent.resolve() / named.name
    check_place(named)
    folder_name("target", partial_of(named))  # which has a longer name
    return named


def _is_finished(target: Path, description: Mapping[str, Any]) -> bool:
    """Whether the target already holds exactly this conversion, with all its files."""
    return read_manifest(target) == description and all((target / name).exists() for name in description["files"])
