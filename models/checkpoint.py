"""Reads the weights of a Hugging Face folder (safetensors, one file or several with an index) into parameters.

One tensor at a time, in pieces: from the mapped file, cast on the way, into one aligned host buffer, and from there to
the device. On CPU that buffer becomes the parameter itself, so reading costs no more host memory than the parameters
and one piece; on an accelerator it costs one tensor. Nothing refers to the file afterwards. Pickled files are never
opened.

Format: https://github.com/huggingface/safetensors (8 bytes header size, JSON header, then the data).
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from decodax.layers.weight import Weight
from decodax.models.config import ModelConfig
from decodax.models.families._contract import Family, ParameterPath

Put = Callable[[np.ndarray, Weight, ParameterPath], jax.Array]

PIECE_BYTES = 2**20  # read at once: small beside any weight that matters, and within a processor's cache
_ALIGNMENT_BYTES = 64  # what JAX asks of a host buffer that it is to use in place
_HUGE_PAGE_BYTES = 2**21  # Linux's large pages, for which NumPy asks with arrays of twice that size and more

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# Stored beside the weights by some programs, and derived from the config: nothing is lost without them.
REDUNDANT_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "self_attn.masked_bias")


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
    progress: called with (bytes done, bytes in all) after each tensor.
    Raises FileNotFoundError for missing files; ValueError for damaged ones, and one that lists every missing, surplus
    and misshapen weight. Warns with NonFiniteWeightWarning.
    """
    put = put or (lambda array, weight, path: jax.device_put(array))
    dtype = np.dtype(dtype)
    described = _flat(config.weights())
    with ExitStack() as stack:
        stored = _open(weight_files(folder), stack)
        source = _match(stored, family.tensor_names(config), described, config, folder)
        total = sum(math.prod(described[path].shape) * dtype.itemsize for path in source)
        done, leaves, not_finite = 0, {}, []

        def transfer(
            path: ParameterPath, name: str
        ) -> jax.Array:  # a function, so that one host buffer is gone before the next
            host, is_finite = _read(stored[name], dtype)
            if not is_finite:
                not_finite.append(name)
            return jax.block_until_ready(put(host, described[path], path))

        for path, name in source.items():
            leaves[path] = transfer(path, name)
            done += math.prod(described[path].shape) * dtype.itemsize
            if progress is not None:
                progress(done, total)
    if not_finite:
        warnings.warn(
            f"NaN or infinity in {len(not_finite)} weight(s) of {folder}: {', '.join(not_finite)}",
            NonFiniteWeightWarning,
            stacklevel=2,
        )
    return _nested(leaves)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or those that its index names.

    Raises FileNotFoundError when there are none, or one is missing; ValueError for a malformed index.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}{_advice(folder)}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be JSON with a weight_map of tensor names to files: {error!r}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not in {folder}: {', '.join(missing)}")
    return files


def _advice(folder: Path) -> str:
    if found := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        return (
            f", only {', '.join(found)}: pickled files can run code and are not opened. Convert them once "
            "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if found := sorted(file.name for file in folder.glob("*.gguf")):
        return f", only {', '.join(found)}: GGUF is not read; use the model's safetensors files"
    if found := sorted(file.name for file in folder.glob("*.safetensors")):
        return f", only {', '.join(found)}: rename a single file to model.safetensors, or add the index of several"
    return ": the weights are expected in one of them"


def _open(files: list[Path], stack: ExitStack) -> dict[str, Any]:
    """Every stored tensor's name -> a slice of the mapped file that reads nothing yet."""
    stored: dict[str, Any] = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no intact safetensors file ({_sizes(file)}): {error}") from error
        stored |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary
    return stored


def _sizes(file: Path) -> str:
    """What the file's own header says about its size, against its real size."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_size > actual - 8:
            return f"it has {actual} bytes, too few for its header: download or write it again"
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return f"it has {actual} bytes and an unreadable header: download or write it again"
    return f"expected {expected} bytes, it has {actual}: download or write it again"


def _match(
    stored: dict[str, Any],
    names: dict[str, ParameterPath],
    described: dict[ParameterPath, Weight],
    config: ModelConfig,
    folder: Path,
) -> dict[ParameterPath, str]:
    """Which stored tensor fills which parameter, in the order of the files; all that does not fit is one ValueError."""
    if not any(name.startswith("model.") for name in stored):  # a base model's file has the names without the prefix
        names = {name.removeprefix("model."): path for name, path in names.items()}
    path_of = dict(names)
    problems = []
    if config.tie_embeddings and "lm_head.weight" in stored:
        embedding = next(name for name, path in names.items() if path == ("embedding",))
        if embedding not in stored:  # stored once, under its other name
            path_of = {"lm_head.weight" if name == embedding else name: path for name, path in names.items()}
        elif not _equal(stored[embedding], stored["lm_head.weight"]):
            problems.append(
                "lm_head.weight differs from the embedding although the config ties them: "
                "set tie_word_embeddings to false in config.json to use it, or remove it from the file"
            )
    problems += [
        f"missing: {name} {list(described[path].shape)}" for name, path in path_of.items() if name not in stored
    ]
    for name, tensor in stored.items():
        shape, kind = tensor.get_shape(), tensor.get_dtype()
        if name not in path_of:
            if not name.endswith(REDUNDANT_SUFFIXES) and not (config.tie_embeddings and name == "lm_head.weight"):
                problems.append(f"surplus: {name} {shape}")
        elif tuple(shape) != described[path_of[name]].shape:
            problems.append(f"misshapen: {name} {shape}, expected {list(described[path_of[name]].shape)}")
        elif kind not in _DTYPES:
            problems.append(f"unknown kind of number: {name} is {kind}, expected one of {sorted(_DTYPES)}")
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json:\n" + "\n".join(f"  - {line}" for line in problems)
        )
    return {path_of[name]: name for name in stored if name in path_of}


def _pieces(tensor: Any) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive rows of a stored tensor, about PIECE_BYTES at a time."""
    shape = tensor.get_shape()
    row_bytes = math.prod(shape[1:]) * np.dtype(_DTYPES[tensor.get_dtype()]).itemsize
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield rows, tensor[rows]


def _read(tensor: Any, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """A stored tensor as a host array of `dtype`, and whether all of it is finite."""
    shape = tensor.get_shape()
    host = host_buffer(tuple(shape), dtype)
    is_finite = True
    for rows, piece in _pieces(tensor):
        with np.errstate(all="ignore"):  # what overflows in a narrower type is found below
            host[rows] = piece
        is_finite = is_finite and _is_finite(host[rows])
    return host, is_finite


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


def _equal(one: Any, other: Any) -> bool:
    if one.get_shape() != other.get_shape() or one.get_dtype() != other.get_dtype():
        return False
    return all(np.array_equal(piece, other[rows]) for rows, piece in _pieces(one))


def _flat(tree: dict[str, Any], prefix: ParameterPath = ()) -> dict[ParameterPath, Weight]:
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
