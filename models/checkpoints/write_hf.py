"""Writes a model as a Hugging Face folder: from an Orbax checkpoint, or from anything that `decodax.load` gives.

    target/config.json, tokenizer.json, ...    as in the source, with the dtype of the weights updated
    target/model.safetensors                   or model-00001-of-0000N.safetensors with model.safetensors.index.json
    target/decodax.json                        the manifest (`models/checkpoints/conversion.py`)

Every parameter is stored by its family's first name map (`models/checkpoints/name_map.py`) for plain numbers: separate
experts if programs store them so, gate and up in one tensor if the family's files have one. One stored tensor at a time
is in memory. All offsets in the files are known before the first byte is written, so an interrupted run continues with
the next tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from decodax.models.checkpoints import conversion
from decodax.models.checkpoints.conversion import Conversion, Weights
from decodax.models.checkpoints.formats.mxfp4 import is_packed_name
from decodax.models.checkpoints.name_map import NameMaps, Shape, TensorSlice, full_region, pieces
from decodax.models.checkpoints.reading import Progress, host_buffer
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES
from decodax.models.checkpoints.staged_folder import StagedFolder
from decodax.models.families.contract import ParameterPath
from decodax.models.load import LanguageModel

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

_KINDS = {np.dtype(dtype): kind for kind, dtype in PLAIN_DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written.

    name, shape, dtype: of the tensor.
    slices: the parameters that fill it, and the slice that each fills.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    slices: tuple[tuple[ParameterPath, TensorSlice], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def to_hf(
    source: str | os.PathLike[str] | LanguageModel,
    target: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapters: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the folder `target`.

    source: a model folder, of either kind, or a loaded model.
    max_shard_bytes: no file is larger, unless one tensor is.
    target, dtype, adapters, overwrite, progress: as for `from_hf`, and so are the errors and the warnings.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1 (bytes in one file), got {max_shard_bytes}")
    target = conversion.absolute_target(target)
    opened = conversion.open_source(source, adapters)
    dtypes = opened.dtypes(dtype)
    tensors = tensors_of(opened.weights, opened.name_maps, dtypes)
    files = _files(tensors, max_shard_bytes)

    def write(folder: StagedFolder, wrote: Callable[[int], None]) -> None:
        for name, content in files.items():
            _write_file(folder, name, content, opened.weights, wrote)
        if len(files) > 1:
            folder.write_file(INDEX, _index(files))

    names = [*files, INDEX] if len(files) > 1 else [*files]
    description = conversion.manifest(opened, dtypes, "hf", names, max_shard_bytes=max_shard_bytes)
    sizes = {tensor.name: tensor.num_bytes for tensor in tensors}
    config = conversion.config_json(opened, dtypes)
    return conversion.convert(opened, target, description, config, sizes, write, overwrite=overwrite, progress=progress)


def tensors_of(
    weights: Weights, name_maps: Mapping[ParameterPath, NameMaps], dtypes: Mapping[ParameterPath, np.dtype]
) -> list[Tensor]:
    """The tensors that hold all the parameters, in the order of the name maps.

    Raises ValueError if the parameters of a tensor do not fill it.
    """
    slices: dict[str, list[tuple[ParameterPath, TensorSlice]]] = {}
    for path, several in name_maps.items():
        name_map = next(
            name_map for name_map in several if not any(is_packed_name(tensor_slice.name) for tensor_slice in name_map)
        )
        for tensor_slice in name_map:
            slices.setdefault(tensor_slice.name, []).append((path, tensor_slice))
    tensors = []
    for name, pairs in slices.items():
        (shape, *others) = {tensor_slice.stored_shape(weights.weights[path].shape) for path, tensor_slice in pairs}
        filled = sum(math.prod(_given(tensor_slice, weights.weights[path].shape)) for path, tensor_slice in pairs)
        if others or filled != math.prod(shape):
            raise ValueError(
                f"{name} {list(shape)} cannot be written: {', '.join('/'.join(path) for path, _ in pairs)} hold "
                f"{filled} of its {math.prod(shape)} numbers"
            )
        kinds = {dtypes[path] for path, _ in pairs}
        dtype = np.dtype(jnp.promote_types(*kinds) if len(kinds) == 2 else next(iter(kinds)))
        tensors.append(Tensor(name, shape, dtype, tuple(pairs)))
    return tensors


def _given(tensor_slice: TensorSlice, parameter: Shape) -> Shape:
    return parameter if tensor_slice.at is None else parameter[1:]


def _files(tensors: Sequence[Tensor], max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors of each file: in order, as many as fit; within a file those of wide dtypes first."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + tensor.num_bytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    groups = [sorted(group, key=lambda tensor: -tensor.dtype.itemsize) for group in groups]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def _index(files: Mapping[str, list[Tensor]]) -> bytes:
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _header(tensors: Iterable[Tensor]) -> bytes:
    """The header of a file, before its numbers; https://github.com/huggingface/safetensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(
    folder: StagedFolder, name: str, tensors: Sequence[Tensor], weights: Weights, wrote: Callable[[int], None]
) -> None:
    """Writes the tensors that a file does not hold yet, each at its offset."""
    if all(tensor.name in folder.done for tensor in tensors):
        return
    header, place = _header(tensors), 0
    with open(os.open(folder.content / name, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:

        def sync() -> None:
            file.flush()
            os.fsync(file.fileno())

        file.write(header)
        for tensor in tensors:
            if tensor.name not in folder.done:
                file.seek(len(header) + place)
                file.write(_numbers(tensor, weights).reshape(-1).view(np.uint8).data)
                folder.note(tensor.name, tensor.num_bytes, sync)
                wrote(tensor.num_bytes)
            place += tensor.num_bytes
        folder.flush(sync)


def _numbers(tensor: Tensor, weights: Weights) -> np.ndarray:
    """A tensor's content: its slices are read one after the other, each to its indices."""
    stored = None
    for path, tensor_slice in tensor.slices:
        shape = weights.weights[path].shape
        region = full_region(shape)
        if tensor_slice.at is not None:
            region = (slice(tensor_slice.at, tensor_slice.at + 1), *region[1:])
        numbers = weights.read(path, region, tensor.dtype)
        if tensor_slice.part is None and not tensor_slice.transposed:
            return numbers.reshape(tensor.shape)
        if stored is None:
            stored = host_buffer(tensor.shape, tensor.dtype)
        matrix = stored.reshape(-1, tensor.shape[-1])
        for view, rows, columns in pieces(tensor_slice, tensor.shape, shape, region, numbers, numbers.size):
            matrix[rows, columns] = view
    assert stored is not None  # a tensor has slices
    return stored
