"""Reads the weight formats of checkpoints: plain floats, FP8 with a scale per block, and mxfp4.

Each format gives rows of the dequantised tensor, so that a layer sees ordinary weights. All axes but the last count as
rows.

FP8 is DeepSeek-V3's (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3): `X` in F8_E4M3 beside `X_scale_inv`.
There the activations are rounded to FP8 as well; here they are not, only the weights are read.
mxfp4 is gpt-oss's (OCP Microscaling Formats specification 1.0): `X_blocks` beside `X_scales`. The names in a family's
name maps are those of the numbers, `X` and `X_blocks`; their scales come with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from decodax.core.printable import printable
from decodax.models.checkpoints.safetensors_files import Entry, RawTensor, open_file

PLAIN_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SCALE_DTYPES = PLAIN_DTYPES | {"F8_E8M0": ml_dtypes.float8_e8m0fnu}
_FP8_KIND = "F8_E4M3"
_MXFP4_BYTES = 16  # a group: 32 numbers of four bits that share a scale

_ALL_BYTES = np.arange(256, dtype=np.uint8)
_FP8_VALUES = _ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FP4_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])
# Both numbers of a byte, the low half first, as one item of eight bytes: looked up six times faster than two of four.
_FP4_PAIRS = _FP4_VALUES[np.stack([_ALL_BYTES & 15, _ALL_BYTES >> 4], axis=1)].view(np.uint64)[:, 0]
_MXFP4_SCALES = _ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)  # 2^(byte - 127), and 255 is NaN

_FP8_FIELDS = {
    "quant_method",
    "fmt",
    "weight_block_size",
    "activation_scheme",
    "scale_fmt",
    "expert_dtype",
    "dequantize",
    "modules_to_not_convert",
    "ignored_layers",
}
_MXFP4_FIELDS = {"quant_method", "dequantize", "modules_to_not_convert"}


@dataclass(frozen=True)
class Quantization:
    """The weight format in `quantization_config`.

    method: "fp8" or "mxfp4".
    block: fp8's (outputs, inputs) per scale.
    """

    method: str
    block: tuple[int, int] = (0, 0)


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor of a checkpoint: `label` is its name in messages, `dtype` that of the rows it gives."""

    @property
    def label(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        """[rows, last axis]; a slice gives a view of the file if nothing has to be computed."""
        ...


@dataclass(frozen=True, eq=False)
class Plain:
    """Plain floating-point numbers."""

    label: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @cached_property
    def _matrix(self) -> np.ndarray:
        return _as_matrix(self.array)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self._matrix[index]


@dataclass(frozen=True, eq=False)
class BlockScaled:
    """FP8: number [i, j] of the last two axes is value[i, j] x scale[i // block[0], j // block[1]].

    label: name in messages.
    codes: the bytes of float8_e4m3fn.
    scales: one for each block, also for those that the edge cuts.
    block: (outputs, inputs) per scale.
    """

    label: str
    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        num_rows, num_columns = self.shape[-2:]
        codes = _as_matrix(self.codes)
        numbers = np.arange(*index.indices(len(codes))) if isinstance(index, slice) else index
        matrix, row = np.divmod(numbers, num_rows)
        scales = _as_matrix(self.scales)[matrix * self.scales.shape[-2] + row // self.block[0]].astype(np.float32)
        values = _FP8_VALUES.take(codes[index], mode="wrap")  # faster than checking what a byte cannot exceed
        with np.errstate(all="ignore"):  # the reader reports NaN and infinity
            values *= np.repeat(scales, self.block[1], axis=1)[:, :num_columns]
        return values


@dataclass(frozen=True, eq=False)
class Mxfp4:
    """Numbers of four bits (sign, two bits of exponent, one of mantissa), 32 in a row with one scale 2^(byte - 127).

    label: name in messages.
    blocks: bytes [.., rows, groups, 16], the low half first.
    scales: bytes [.., rows, groups].
    """

    label: str
    blocks: np.ndarray
    scales: np.ndarray

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * 2 * _MXFP4_BYTES)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        num_groups = self.scales.shape[-1]
        values = _FP4_PAIRS[self.blocks.reshape(-1, num_groups, _MXFP4_BYTES)[index]].view(np.float32)
        with np.errstate(all="ignore"):
            values *= _MXFP4_SCALES[_as_matrix(self.scales)[index]][..., None]
        return values.reshape(-1, self.shape[-1])


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1] if array.ndim else 1)


def read_quantization(field: Any) -> Quantization | None:
    """The weight format in the field `quantization_config` of a `config.json`; None for plain weights.

    Raises ValueError for a method, or details of one, that are not supported.
    """
    if field is None:
        return None
    method = field.get("quant_method") if isinstance(field, Mapping) else None
    if method not in ("fp8", "mxfp4"):
        raise ValueError(
            "quantization_config must be null or absent, or have quant_method fp8 (with a scale per block) or mxfp4, "
            f"got {printable(repr(field))}: use a checkpoint with plain (float) weights"
        )
    if unknown := sorted(field.keys() - (_FP8_FIELDS if method == "fp8" else _MXFP4_FIELDS)):
        raise ValueError(
            f"quantization_config with quant_method {method} has fields that are not understood: {printable(unknown)}"
        )
    if method == "mxfp4":
        return Quantization(method)
    for name, known in {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}.items():
        if field.get(name, known) != known:
            raise ValueError(
                f"quantization_config.{name} must be {known} or absent with quant_method fp8, got "
                f"{printable(repr(field[name]))}"
            )
    block = field.get("weight_block_size", [128, 128])
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(
            "quantization_config.weight_block_size must be two whole numbers from 1 on with quant_method fp8 "
            f"(outputs and inputs that share a scale), got {printable(repr(block))}"
        )
    return Quantization(method, (block[0], block[1]))


def is_packed_name(name: str) -> bool:
    """Whether a name in a family's name map is that of packed numbers (mxfp4)."""
    return name.endswith("_blocks")


def scales_of(name: str, stored: Mapping[str, Entry]) -> str | None:
    """The name of the tensor with this one's scales, if its weight format has them."""
    if stored[name].kind == _FP8_KIND:
        return f"{name}_scale_inv"
    if stored[name].kind == "U8" and is_packed_name(name):
        return f"{name.removesuffix('_blocks')}_scales"
    return None


def interpret(name: str, stored: Mapping[str, Entry], quantization: Quantization | None) -> StoredTensor:
    """The tensor that `stored[name]` and its scales encode.

    Raises ValueError when the format is unknown, the scales are missing or misshapen, or `quantization` differs.
    """
    raw, scale_name, tensor = stored[name], scales_of(name, stored), printable(name)
    if scale_name is None:
        if raw.kind not in PLAIN_DTYPES:
            raise ValueError(
                f"unknown kind of number: {tensor} is {printable(raw.kind)}, expected one of {sorted(PLAIN_DTYPES)}, "
                "or fp8 or mxfp4 with their scales"
            )
        if isinstance(raw, StoredTensor):  # an array of an Orbax checkpoint
            return raw
        assert isinstance(raw, RawTensor)
        return Plain(tensor, raw.array(PLAIN_DTYPES[raw.kind]))
    method = "fp8" if raw.kind == _FP8_KIND else "mxfp4"
    if quantization is None or quantization.method != method:
        raise ValueError(
            f"not in config.json: {tensor} is stored as {method}, but there is no quantization_config with "
            f"quant_method {method}; copy it from where the checkpoint comes from"
        )
    if method == "fp8":
        if len(raw.shape) < 2:
            raise ValueError(f"misshapen: {tensor} {list(raw.shape)} is stored as fp8, which needs two axes or more")
        counts = tuple(-(-size // block) for size, block in zip(raw.shape[-2:], quantization.block, strict=True))
        shape = (*raw.shape[:-2], *counts)
        block = " x ".join(map(str, quantization.block))
        what = f"one scale for each {block} (weight_block_size) of {tensor} {list(raw.shape)}"
    else:
        if len(raw.shape) < 3 or raw.shape[-1] != _MXFP4_BYTES:
            raise ValueError(f"misshapen: {tensor} {list(raw.shape)}, expected [.., rows, groups, {_MXFP4_BYTES}]")
        shape, what = raw.shape[:-1], f"one scale for each group of {tensor} {list(raw.shape)}"
    if scale_name not in stored:
        raise ValueError(f"missing: {printable(scale_name)} {list(shape)}, {what}")
    scales = stored[scale_name]
    assert isinstance(raw, RawTensor) and isinstance(scales, RawTensor)
    if scales.shape != shape:
        raise ValueError(f"misshapen: {printable(scale_name)} {list(scales.shape)}, expected {list(shape)}, {what}")
    kinds = _SCALE_DTYPES if method == "fp8" else {"U8": np.uint8}
    if scales.kind not in kinds:
        raise ValueError(
            f"unknown kind of number: {printable(scale_name)} is {printable(scales.kind)}, expected one of "
            f"{sorted(kinds)}"
        )
    label, codes, factors = (
        f"{tensor} with {printable(scale_name)}",
        raw.array(np.uint8),
        scales.array(kinds[scales.kind]),
    )
    return BlockScaled(label, codes, factors, quantization.block) if method == "fp8" else Mxfp4(label, codes, factors)


def is_stored_as(method: str, stored: Mapping[str, Entry]) -> bool:
    """Whether any tensor has this weight format."""
    kind = _FP8_KIND if method == "fp8" else "U8"
    return any(tensor.kind == kind and scales_of(name, stored) is not None for name, tensor in stored.items())


def read_floats(file: Path, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """All tensors of a small safetensors file, in memory and rounded to `dtype`.

    Raises ValueError for a damaged file, and for a tensor with no floating-point numbers, or with non-finite ones.
    """
    arrays = {}
    for name, tensor in open_file(file).items():
        if tensor.kind not in PLAIN_DTYPES:
            raise ValueError(
                f"{printable(name)} in {printable(file)} must hold floating-point numbers ({', '.join(PLAIN_DTYPES)}), "
                f"got {printable(tensor.kind)}"
            )
        with np.errstate(all="ignore"):
            arrays[name] = tensor.array(PLAIN_DTYPES[tensor.kind]).astype(np.dtype(dtype))
        require_finite(arrays[name], name, file)
    return arrays


def require_finite(array: np.ndarray, name: str, file: Path) -> None:
    """Raises ValueError if an array of a file holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise ValueError(f"{printable(name)} in {printable(file)} holds NaN or infinity (as {array.dtype.name})")
