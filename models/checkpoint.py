"""Reads the weights of a Hugging Face folder (safetensors, one file or several with an index) into parameters.

One parameter at a time, in pieces: from the mapped file, cast on the way, into one aligned host buffer, and from there
to the device. On CPU that buffer becomes the parameter itself, so reading costs no more host memory than the parameters
and one piece; on an accelerator it costs one parameter. Nothing refers to the file afterwards.

`models/stored_files.py` opens the files, `models/layouts.py` finds the tensors that fill each parameter,
`models/sources.py` says which part of them, and `models/stored_formats.py` reads their numbers.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from decodax.layers.weight import Weight
from decodax.models.config import ModelConfig
from decodax.models.families._contract import EMBEDDING_NAME, HEAD_NAME, Family, ParameterPath
from decodax.models.layouts import Expected, find_sources
from decodax.models.sources import Layouts, Source, transfers
from decodax.models.stored_files import open_files, weight_files
from decodax.models.stored_formats import StoredTensor, read_quantization
from decodax.sharding import rules as sharding

Put = Callable[[np.ndarray, Weight, ParameterPath], jax.Array]

PIECE_BYTES = 2**20  # read at once: small beside any weight that matters, and within a processor's cache
_ALIGNMENT_BYTES = 64  # what JAX asks of a host buffer that it is to use in place
_HUGE_PAGE_BYTES = 2**21  # Linux's large pages, for which NumPy asks with arrays of twice that size and more


class NonFiniteWeightWarning(UserWarning):
    """A checkpoint holds NaN or infinity: what the model computes with it will most likely be NaN."""


def load_params(
    folder: Path,
    family: Family,
    config: ModelConfig,
    *,
    dtype: jnp.dtype,
    put: Put | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameters of a folder, as nested as `config.weights()`, every leaf cast to `dtype`.

    put: (host array, description, path) -> device array, for shardings; by default the first device. It may keep the
        host array: nobody writes it again.
    progress: called with (bytes done, bytes in all) after each parameter.
    Raises FileNotFoundError for missing files; ValueError for damaged ones, and one that lists every missing, surplus
    and misshapen weight. Warns with NonFiniteWeightWarning.
    """
    return load_part(
        folder,
        family.layouts(config),
        config.weights(),
        dtype=dtype,
        put=put,
        progress=progress,
        tied_head=(HEAD_NAME, EMBEDDING_NAME) if config.tie_embeddings else None,
        elsewhere=None if family.elsewhere is None else family.elsewhere(config),
    )


def load_part(
    folder: Path,
    layouts: Mapping[ParameterPath, Layouts],
    weights: Mapping[str, Any],
    *,
    dtype: jnp.dtype,
    put: Put | None = None,
    progress: Callable[[int, int], None] | None = None,
    tied_head: tuple[str, str] | None = None,
    elsewhere: str | None = ".*",
) -> dict[str, Any]:
    """The parameters of a part of a checkpoint: `weights` describes them, `layouts` says where they stand.

    tied_head: the names of a head and of the embedding that it must equal where both are stored.
    elsewhere: a regular expression for the whole names of stored tensors that belong to other parts; by default all
        that the layouts do not name do.
    The other arguments, errors and warnings are those of `load_params`.
    """
    put = put or (lambda array, weight, path: jax.device_put(array))
    dtype = np.dtype(dtype)
    described = _flat(weights)
    shapes = {path: weight.shape for path, weight in described.items()}
    stored = open_files(weight_files(folder))
    expected = Expected(layouts, shapes, _quantization(folder), tied_head, elsewhere)
    filled = find_sources(stored, expected, str(folder))
    total = sum(math.prod(shapes[path]) * dtype.itemsize for path in filled)
    done, leaves, not_finite = 0, {}, {}

    def transfer(path: ParameterPath) -> jax.Array:  # a function, so that one host buffer is gone before the next
        host = host_buffer(shapes[path], dtype)
        for source, tensor in filled[path]:
            if not _fill(host, source, tensor):
                not_finite[tensor.label] = None
        return jax.block_until_ready(put(host, described[path], path))

    for path in filled:
        leaves[path] = transfer(path)
        done += math.prod(shapes[path]) * dtype.itemsize
        if progress is not None:
            progress(done, total)
    if not_finite:
        warnings.warn(
            f"NaN or infinity in {len(not_finite)} weight(s) of {folder}: {', '.join(not_finite)}",
            NonFiniteWeightWarning,
            stacklevel=3,
        )
    return _nested(leaves)


def put_on(mesh: Mesh | None, rules: sharding.Rules) -> Put | None:
    """What brings a parameter to its place on a mesh; None, for the first device, without one."""
    if mesh is None:
        return None
    return lambda array, weight, path: sharding.place(mesh, rules, array, weight, "/".join(path))


def _quantization(folder: Path) -> Any:
    """What the folder's `config.json` says of the form of the weights; a folder without one has plain weights."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return read_quantization(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))


def _fill(host: np.ndarray, source: Source, tensor: StoredTensor) -> bool:
    """Copies what a source gives into its place in a parameter; whether all of it is finite."""
    is_finite = True
    for place, piece in transfers(source, tensor, host, PIECE_BYTES):
        with np.errstate(all="ignore"):  # what overflows in a narrower type is found below
            place[...] = piece
        is_finite = is_finite and _is_finite(place)
    return is_finite


def host_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can use in place on CPU; a large one starts at a large page.

    Decoding on CPU reads every weight at every step: weights in large pages were measured 11 % faster.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    alignment = _HUGE_PAGE_BYTES if size_bytes >= 2 * _HUGE_PAGE_BYTES else _ALIGNMENT_BYTES
    raw = np.empty(size_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, from the bits: as fast as reading, also for types that NumPy emulates."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    magnitude = array.view(bits) & bits.type(np.iinfo(bits).max >> 1)
    infinity = np.array(np.inf, array.dtype).view(bits)
    return bool(magnitude.max(initial=0) < infinity)


def _flat(tree: Mapping[str, Any], prefix: ParameterPath = ()) -> dict[ParameterPath, Weight]:
    leaves: dict[ParameterPath, Weight] = {}
    for name, value in tree.items():
        leaves |= {(*prefix, name): value} if isinstance(value, Weight) else _flat(value, (*prefix, name))
    return leaves


def _nested(leaves: dict[ParameterPath, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree
