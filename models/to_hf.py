"""Writes a model as a Hugging Face folder: from an Orbax checkpoint, or from anything that `decodax.load` gives.

    target/config.json, tokenizer.json, ...    as in the source, the type of the weights brought up to date
    target/model.safetensors                   or model-00001-of-0000N.safetensors with model.safetensors.index.json
    target/decodax.json                        what it is and what it was made from (`models/conversion.py`)

Every parameter goes where the first layout of its family has it (`models/sources.py`), of those for plain numbers:
experts apart where programs store them so, gate and up in one tensor where the family's files have one. One stored
tensor at a time is in memory. All places in the files are known before the first byte is written, so an interrupted
run goes on with the next tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from decodax.models import conversion
from decodax.models.checkpoint import Progress, host_buffer
from decodax.models.conversion import Conversion, Weights
from decodax.models.families._contract import ParameterPath
from decodax.models.load import LanguageModel
from decodax.models.sources import Layouts, Shape, Source, pieces, whole_region
from decodax.models.staged_folder import StagedFolder
from decodax.models.stored_formats import PLAIN_DTYPES, stands_for_packed

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

_KINDS = {np.dtype(dtype): kind for kind, dtype in PLAIN_DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written. parts: the parameters that fill it, and where in it each stands."""

    name: str
    shape: Shape
    dtype: np.dtype
    parts: tuple[tuple[ParameterPath, Source], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def to_hf(
    source: str | os.PathLike[str] | LanguageModel,
    target: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the folder `target`.

    source: a model folder, of either kind, or a loaded model. max_shard_bytes: no file is larger, unless one tensor is.
    The other arguments, the errors and the warnings are those of `from_hf`.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1 (bytes in one file), got {max_shard_bytes}")
    target = conversion.absolute_target(target)
    opened = conversion.open_source(source)
    dtypes = opened.dtypes(dtype)
    tensors = tensors_of(opened.weights, opened.layouts, dtypes)
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
    weights: Weights, layouts: Mapping[ParameterPath, Layouts], dtypes: Mapping[ParameterPath, np.dtype]
) -> list[Tensor]:
    """The tensors that hold all the parameters, in the order of the layouts.

    Raises ValueError where the parameters of a tensor do not fill it.
    """
    parts: dict[str, list[tuple[ParameterPath, Source]]] = {}
    for path, several in layouts.items():
        layout = next(layout for layout in several if not any(stands_for_packed(source.name) for source in layout))
        for source in layout:
            parts.setdefault(source.name, []).append((path, source))
    tensors = []
    for name, sources in parts.items():
        (shape, *others) = {source.stored_shape(weights.weights[path].shape) for path, source in sources}
        filled = sum(math.prod(_given(source, weights.weights[path].shape)) for path, source in sources)
        if others or filled != math.prod(shape):
            raise ValueError(
                f"{name} {list(shape)} cannot be written: {', '.join('/'.join(path) for path, _ in sources)} hold "
                f"{filled} of its {math.prod(shape)} numbers"
            )
        kinds = {dtypes[path] for path, _ in sources}
        dtype = np.dtype(jnp.promote_types(*kinds) if len(kinds) == 2 else next(iter(kinds)))
        tensors.append(Tensor(name, shape, dtype, tuple(sources)))
    return tensors


def _given(source: Source, parameter: Shape) -> Shape:
    return parameter if source.at is None else parameter[1:]


def _files(tensors: Sequence[Tensor], max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """Which tensors each file holds: in order, as many as there is room for; in a file those of wide types first."""
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
    """What stands in front of the numbers of a file; https://github.com/huggingface/safetensors."""
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
    """Writes what is not there yet of a file, every tensor at its place."""
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
    """A tensor's content: its parts read one after the other, each put where it stands."""
    stored = None
    for path, source in tensor.parts:
        shape = weights.weights[path].shape
        region = whole_region(shape)
        if source.at is not None:
            region = (slice(source.at, source.at + 1), *region[1:])
        numbers = weights.read(path, region, tensor.dtype)
        if source.part is None and not source.transposed:
            return numbers.reshape(tensor.shape)
        if stored is None:
            stored = host_buffer(tensor.shape, tensor.dtype)
        matrix = stored.reshape(-1, tensor.shape[-1])
        for view, rows, columns in pieces(source, tensor.shape, shape, region, numbers, numbers.size):
            matrix[rows, columns] = view
    assert stored is not None  # a tensor has parts
    return stored
