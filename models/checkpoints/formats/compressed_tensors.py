"""Reads the weights of compressed-tensors (llm-compressor, vLLM): whole numbers, FP8 and NVFP4.

Formats of https://github.com/vllm-project/compressed-tensors; a group of `config_groups` says which modules have which:

    pack-quantized          X.weight_packed int32, codes of 4 or 8 bits + 2^(bits - 1); X.weight_shape
    int-quantized           X.weight int8
    float-quantized         X.weight F8_E4M3
    nvfp4-pack-quantized    X.weight_packed uint8, two codes of E2M1 in each, the first in the low half;
                            X.weight_scale F8_E4M3 and X.weight_global_scale

with X.weight_scale per tensor, channel, group of inputs or block, and X.weight_zero_point where the codes are not
symmetric. Number = (code - zero) * scale in float32; an NVFP4 scale is weight_scale / weight_global_scale. The library
rounds the result to the dtype of the scales. Where it rounds activations as well, decodax does not: only the weights
are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.compressed_tensors_config import Scheme, Settings, read_settings
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fp8 import FP8_KIND, FP8_VALUES
from decodax.models.checkpoints.formats.gptq import WORDS
from decodax.models.checkpoints.formats.mxfp4 import FP4_VALUES
from decodax.models.checkpoints.formats.unpacking import codes_of, columns_of, halves
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry, RawTensor

_PACKED, _WEIGHT, _SCALE, _ZEROS = "weight_packed", "weight", "weight_scale", "weight_zero_point"
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_SHAPE = {"I64": np.int64, "I32": np.int32}


@dataclass(frozen=True, eq=False)
class CompressedTensor(Packed):
    """Number [o, i] = (code[o, i] - zero[r, g]) * scale[r, g], where r, g are o's and i's blocks.

    Its parts: codes int8 [rows, inputs], or bytes of float8_e4m3fn, or the four bits of E2M1 (uint8); scales [rows,
    groups] in the stored dtype, or float32 for NVFP4; zeros int8 [rows, groups].

    codes: as stored: words (uint32), int8 or bytes (uint8).
    scales: [blocks of outputs, groups].
    zeros: int8 like the scales, words packed along the outputs (uint32), or None.
    block: (outputs, inputs) per scale.
    scheme: of the module.
    global_scale: by which NVFP4's scales are divided.
    group_of: the group of each input; None: consecutive groups.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    block: tuple[int, int]
    scheme: Scheme
    global_scale: np.ndarray | None = None
    group_of: np.ndarray | None = None

    def parts(self, index: slice | np.ndarray) -> Parts:
        rows = self.row_numbers(index)
        scales = self.scales[rows // self.block[0]]
        if self.global_scale is not None:
            with np.errstate(all="ignore"):
                scales = scales.astype(np.float32) / self.global_scale
        parts = Parts(self.codes[index], scales, self.block[1], zeros=self._zeros(rows), group_of=self.group_of)
        if self.codes.dtype == np.uint32:
            codes = codes_of(parts.codes, self.scheme.bits)[:, : self.shape[1]]
            return replace(parts, codes=_signed(codes, self.scheme.bits))
        if self.global_scale is not None:
            return replace(parts, codes=halves(parts.codes), values=FP4_VALUES)
        return replace(parts, values=FP8_VALUES) if self.scheme.type == "float" else parts

    def _zeros(self, rows: np.ndarray) -> np.ndarray | None:
        if self.zeros is None or self.zeros.dtype != np.uint32:
            return None if self.zeros is None else self.zeros[rows // self.block[0]]
        return _signed(columns_of(self.zeros.T, rows, self.scheme.bits).T, self.scheme.bits)


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes that are stored with 2^(bits - 1) added, as int8."""
    return (codes - np.uint8(2 ** (bits - 1))).view(np.int8)


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    for suffix in (_PACKED, _WEIGHT):
        if name.endswith(f".{suffix}"):
            prefix = name.removesuffix(suffix)
            is_packed = suffix == _PACKED or stored[name].kind in ("I8", FP8_KIND)
            return (f"{prefix}{_WEIGHT}", prefix) if is_packed else None
    return None


def _tensor(pieces: Pieces, settings: Settings) -> PackedTensor:
    scheme = settings.scheme_of(pieces.prefix.removesuffix("."))
    if scheme is None:
        raise ValueError(
            f"not in config.json: {printable(pieces.name)} is stored as compressed-tensors, but no group of "
            "quantization_config.config_groups targets it, or ignore names it"
        )
    if pieces.has(_PACKED) and pieces.has(_WEIGHT):
        raise ValueError(f"surplus: {printable(pieces.name)} is stored twice, once packed: keep one of the two")
    if scheme.is_nvfp4:
        return _nvfp4(pieces, scheme)
    if pieces.has(_PACKED):
        codes, shape = _words(pieces, scheme)
    else:
        kind = "I8" if scheme.type == "int" else FP8_KIND
        piece = pieces.matrix(_WEIGHT, [kind], "[outputs, inputs]")
        codes, shape = piece.array(np.int8 if kind == "I8" else np.uint8), piece.shape
    counts, block = _blocks(shape, scheme, pieces)
    what = f"one scale for each {scheme.strategy} of {printable(pieces.name)} {list(shape)}"
    scales = _scales(pieces, scheme, what, counts)
    zeros = None if scheme.symmetric else _zeros(pieces, scheme, what.replace("scale", "zero point"), counts, shape)
    group_of = _group_of(pieces, scheme, shape, counts)
    arrays = (codes, scales, zeros, block, scheme)
    return CompressedTensor(pieces.label, shape, pieces.mappings, *arrays, group_of=group_of)


def _words(pieces: Pieces, scheme: Scheme) -> tuple[np.ndarray, tuple[int, int]]:
    """The words of integer codes, and the shape of the numbers."""
    if scheme.type != "int":
        raise ValueError(
            f"misshapen: {printable(pieces.prefix)}{_PACKED} holds integers or NVFP4, but config_groups in config.json "
            f"says {scheme.type} of {scheme.bits} bits, {scheme.strategy}"
        )
    words = pieces.matrix(_PACKED, WORDS, "[outputs, inputs * bits / 32]")
    piece = pieces.take("weight_shape", _SHAPE, f"the shape of {printable(pieces.name)}", (2,))
    num_outputs, num_inputs = (int(size) for size in piece.array(_SHAPE[piece.kind]))
    if num_outputs != words.shape[0] or num_inputs < 1 or -(-num_inputs * scheme.bits // 32) != words.shape[1]:
        raise ValueError(
            f"misshapen: {printable(pieces.prefix)}{_PACKED} {list(words.shape)} does not hold "
            f"{[num_outputs, num_inputs]} (weight_shape) codes of {scheme.bits} bits"
        )
    return words.array(np.uint32), (num_outputs, num_inputs)


def _blocks(shape: tuple[int, ...], scheme: Scheme, pieces: Pieces) -> tuple[tuple[int, int], tuple[int, int]]:
    """The number of scales along both axes, and the outputs and inputs of each."""
    block = {
        "tensor": (shape[0], shape[1]),
        "channel": (1, shape[1]),
        "group": (1, scheme.group_size),
        "tensor_group": (1, scheme.group_size),
        "block": scheme.block,
    }[scheme.strategy]
    if scheme.strategy != "block" and shape[1] % block[1]:
        raise ValueError(
            f"misshapen: {printable(pieces.name)} has {shape[1]} inputs, which group_size = {block[1]} of its group in "
            "quantization_config.config_groups does not divide"
        )
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1])), block


def _scales(pieces: Pieces, scheme: Scheme, what: str, counts: tuple[int, int]) -> np.ndarray:
    piece = pieces.take(_SCALE, PLAIN_DTYPES, what)
    _require_shape(piece, pieces.prefix + _SCALE, scheme, what, counts)
    return piece.array(piece.dtype).reshape(counts)


def _require_shape(piece: RawTensor, name: str, scheme: Scheme, what: str, counts: tuple[int, int]) -> None:
    """Raises ValueError if a piece is not one number for each block; axes of size 1 may be left out."""
    forms = {"tensor": [(), (1,), (1, 1)], "channel": [counts, counts[:1]]}.get(scheme.strategy, [counts])
    if piece.shape not in forms:
        expected = " or ".join(str(list(form)) for form in forms)
        raise ValueError(f"misshapen: {printable(name)} {list(piece.shape)}, expected {expected}, {what}")


def _zeros(pieces: Pieces, scheme: Scheme, what: str, counts: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    if pieces.has(_PACKED) and scheme.strategy in ("channel", "group"):
        packed = (-(-shape[0] * scheme.bits // 32), counts[1])
        return pieces.take(_ZEROS, WORDS, f"{what}, packed", packed).array(np.uint32)
    piece = pieces.take(_ZEROS, ["I8"], what)
    _require_shape(piece, pieces.prefix + _ZEROS, scheme, what, counts)
    return piece.array(np.int8).reshape(counts)


def _group_of(pieces: Pieces, scheme: Scheme, shape: tuple[int, ...], counts: tuple[int, int]) -> np.ndarray | None:
    """The group of each input, with activation ordering."""
    if not scheme.ordered:
        return None
    piece = pieces.take("weight_g_idx", _SHAPE, f"the group of each input of {printable(pieces.name)}", shape[1:])
    group_of = piece.array(_SHAPE[piece.kind]).astype(np.int64)
    if group_of.min() < 0 or group_of.max() >= counts[1]:
        raise ValueError(
            f"misshapen: {printable(pieces.prefix)}weight_g_idx must hold groups from 0 to {counts[1] - 1}, got "
            f"{group_of.min()} to {group_of.max()}: download the checkpoint again"
        )
    return group_of


def _nvfp4(pieces: Pieces, scheme: Scheme) -> PackedTensor:
    codes = pieces.matrix(_PACKED, ["U8"], "[outputs, inputs / 2]")
    shape = (codes.shape[0], 2 * codes.shape[1])
    counts, block = _blocks(shape, scheme, pieces)
    what = f"one scale for each {block[1]} inputs of {printable(pieces.name)} {list(shape)}"
    scales = pieces.take(_SCALE, [FP8_KIND], what, counts).array(ml_dtypes.float8_e4m3fn)
    divisor = pieces.take("weight_global_scale", ["F32"], f"the divisor of {printable(pieces.prefix)}{_SCALE}")
    if divisor.shape not in ((), (1,)):
        raise ValueError(
            f"misshapen: {printable(pieces.prefix)}weight_global_scale {list(divisor.shape)}, expected [1]"
        )
    arrays = (codes.array(np.uint8), scales, None, block, scheme)
    global_scale = divisor.array(np.float32).reshape(1)
    return CompressedTensor(pieces.label, shape, pieces.mappings, *arrays, global_scale=global_scale)


_SUFFIXES = (_PACKED, _WEIGHT, _SCALE, _ZEROS, "weight_shape", "weight_global_scale", "weight_g_idx", *_ACTIVATIONS)
FORMAT = Format(read_settings, _packed_as, _SUFFIXES, _tensor)
