"""Reads bitsandbytes' weights: NF4 or FP4 by blocks, and int8 by rows.

QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314 (NF4, double quantisation); LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale, arXiv 2208.07339. As the library's own state dictionaries:

    X.weight                                 bytes [numbers / 2, 1], two codes in each, the first in the high half
    X.weight.quant_map                       float32 [16], the number of each code
    X.weight.absmax                          float32 [blocks], or uint8 [blocks] with double quantisation, and then
    X.weight.nested_quant_map                float32 [256]
    X.weight.nested_absmax                   float32 [blocks / nested_blocksize]
    X.weight.quant_state.bitsandbytes__nf4   JSON as bytes: shape, blocksize, nested_blocksize, nested_offset, ...

    X.weight  int8 [outputs, inputs]
    X.SCB     float32 [outputs]

Blocks are consecutive numbers of the flattened tensor. In float32, number = map[code] * absmax, where a doubly
quantised absmax = nested_map[code] * nested_absmax + nested_offset; and number = code * SCB * (1 / 127), left to right.
The library rounds the result to the dtype that the model was loaded in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import choice, require_known, texts
from decodax.models.checkpoints.formats.unpacking import halves
from decodax.models.checkpoints.model_files import parse_json_object
from decodax.models.checkpoints.safetensors_files import Entry

_WHERE = "with quant_method bitsandbytes"
_WEIGHT, _STATE = "weight", "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STORAGE = {"U8": np.uint8, "I8": np.int8, "F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}  # bytes all the same
_MAX_STATE_BYTES = 2**16
_ROW_FACTOR = 7.874015718698502e-3  # 1 / 127, as the library has it
_FIELDS = frozenset(
    {
        *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"),
        *("llm_int8_skip_modules", "modules_to_not_convert"),
        # how a program runs the weights
        *("llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    }
)


@dataclass(frozen=True, eq=False)
class RowScaled(Packed):
    """Number [o, i] = code[o, i] * scale[o] * (1 / 127).

    Its parts: codes int8 [rows, inputs]; scales float32 [rows, 1], and the factor 1 / 127.

    codes, scales: as stored.
    """

    codes: np.ndarray
    scales: np.ndarray

    def parts(self, index: slice | np.ndarray) -> Parts:
        return Parts(self.codes[index], self.scales[index][:, None], self.shape[1], factor=_ROW_FACTOR)


@dataclass(frozen=True)
class Nested:
    """Scales in eight bits: number = values[code] * scales[code's index // block] + offset."""

    values: np.ndarray
    scales: np.ndarray
    block: int
    offset: np.float32


@dataclass(frozen=True, eq=False)
class FlatBlocks(Packed):
    """Number n of the flattened tensor = values[code n] * scale[n // block].

    Its parts: codes uint8 [rows, inputs] as indices of 16 values; scales float32 [rows, inputs / block], or [rows,
    inputs] where blocks do not end with the rows.

    octets: the codes, two in a byte.
    values: the number of each code.
    scales: of the blocks, float32, or codes of `nested`.
    block: numbers that share a scale.
    nested: None: the scales are plain.
    """

    octets: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    block: int
    nested: Nested | None

    def parts(self, index: slice | np.ndarray) -> Parts:
        num_inputs, rows = self.shape[-1], self.row_numbers(index)
        step = self.block if num_inputs % self.block == 0 else 1
        first = rows[:, None] * num_inputs
        scales = self._scales((first + np.arange(0, num_inputs, step)) // self.block)
        if num_inputs % 2 == 0:
            codes = halves(self.octets.reshape(-1, num_inputs // 2)[index], high_first=True)
        else:
            place = first + np.arange(num_inputs)
            codes = self.octets[place // 2] >> np.where(place % 2, 0, 4).astype(np.uint8) & np.uint8(15)
        return Parts(codes, scales, step, values=self.values)

    def _scales(self, block: np.ndarray) -> np.ndarray:
        if self.nested is None:
            return self.scales[block]
        nested = self.nested
        with np.errstate(all="ignore"):
            scales = nested.values[self.scales[block]] * nested.scales[block // nested.block]
            scales += nested.offset
        return scales


def _settings(field: Mapping[str, Any]) -> None:
    """Checks the fields; what matters stands beside each tensor."""
    require_known(field, _FIELDS, f"quantization_config {_WHERE}")
    choice(field, "bnb_4bit_quant_type", _KINDS, "fp4", _WHERE)
    for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"):
        choice(field, name, (True, False), False, _WHERE)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        texts(field, name, _WHERE)


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    if not name.endswith(f".{_WEIGHT}"):
        return None
    prefix = name.removesuffix(_WEIGHT)
    has_state = any(f"{prefix}{_STATE}{kind}" in stored for kind in _KINDS)
    return (name, prefix) if has_state or stored[name].kind in ("U8", "I8") else None


def _tensor(pieces: Pieces, settings: None) -> PackedTensor:
    codes, tensor = pieces.take(_WEIGHT, _STORAGE, "codes"), printable(pieces.name)
    kind = next((kind for kind in _KINDS if pieces.has(_STATE + kind)), None)
    if kind is None and codes.kind == "I8":
        if len(codes.shape) != 2:
            raise ValueError(f"misshapen: {tensor} {list(codes.shape)}, expected [outputs, inputs]")
        scales = pieces.take("SCB", ["F32"], f"one scale for each row of {tensor}", codes.shape[:1])
        arrays = (codes.array(np.int8), scales.array(np.float32))
        return RowScaled(pieces.label, codes.shape, pieces.mappings, *arrays)
    state = _state(pieces, kind or _KINDS[0])
    shape, block = state["shape"], state["blocksize"]
    count = math.prod(shape)
    octets = codes.array(_STORAGE[codes.kind]).reshape(-1).view(np.uint8)
    if len(octets) != -(-count // 2):
        raise ValueError(
            f"misshapen: {tensor} has {len(octets):,} bytes, expected {-(-count // 2):,} for the shape {list(shape)} "
            "in its quant_state"
        )
    num_blocks = -(-count // block)
    values = pieces.take("weight.quant_map", ["F32"], f"the numbers of the codes of {tensor}", (16,))
    what = f"one scale for each {block} numbers of {tensor} {list(shape)}"
    nested, kinds = None, {"F32": np.float32}
    if pieces.has("weight.nested_absmax"):
        nested, kinds = _nested(pieces, state, num_blocks, what), {"U8": np.uint8}
    scales = pieces.take("weight.absmax", kinds, what, (num_blocks,))
    arrays = (octets, values.array(np.float32), scales.array(kinds[scales.kind]))
    return FlatBlocks(pieces.label, shape, pieces.mappings, *arrays, block, nested)


def _nested(pieces: Pieces, state: Mapping[str, Any], num_blocks: int, what: str) -> Nested:
    block = _whole(state, "nested_blocksize", pieces)
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise ValueError(f"misshapen: {printable(pieces.name)}.quant_state must have a number nested_offset")
    values = pieces.take("weight.nested_quant_map", ["F32"], f"the numbers of the codes of {what}", (256,))
    scales = pieces.take("weight.nested_absmax", ["F32"], f"the scales of {what}", (-(-num_blocks // block),))
    return Nested(values.array(np.float32), scales.array(np.float32), block, np.float32(offset))


def _state(pieces: Pieces, kind: str) -> dict[str, Any]:
    """The checked content of the quant_state."""
    piece = pieces.take(_STATE + kind, ["U8"], f"the shape and the block size of {printable(pieces.name)}")
    where = f"{printable(pieces.prefix)}{_STATE}{kind}"
    if math.prod(piece.shape) > _MAX_STATE_BYTES:
        raise ValueError(f"misshapen: {where} {list(piece.shape)}, expected at most {_MAX_STATE_BYTES} bytes of JSON")
    state = parse_json_object(piece.array(np.uint8).tobytes(), f"misshapen: {where}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"misshapen: {where} must have a shape of two sizes or more, got {printable(repr(shape))}")
    if math.prod(shape) > 2**48:
        raise ValueError(f"misshapen: {where} has the shape {printable(shape)}, which no weight has")
    return {**state, "shape": tuple(shape), "blocksize": _whole(state, "blocksize", pieces)}


def _whole(state: Mapping[str, Any], name: str, pieces: Pieces) -> int:
    value = state.get(name)
    if type(value) is not int or not 1 <= value <= 2**31:
        raise ValueError(
            f"misshapen: {printable(pieces.name)}.quant_state must have {name}, a whole number from 1 on, got "
            f"{printable(repr(value))}"
        )
    return value


_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SUFFIXES = (_WEIGHT, *(f"{_WEIGHT}.{name}" for name in _BESIDE), *(_STATE + kind for kind in _KINDS), "SCB")
FORMAT = Format(_settings, _packed_as, (*_SUFFIXES, "weight_format"), _tensor)
