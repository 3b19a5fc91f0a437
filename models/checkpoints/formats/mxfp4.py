"""Reads mxfp4 weights: numbers of four bits, 32 of which share a scale that is a power of two.

OCP Microscaling Formats specification 1.0, as gpt-oss stores it: `X_blocks` beside `X_scales`. The packed tensor keeps
the name `X_blocks`, and so do the name maps of that family: its axes are [experts, outputs, inputs], those of the plain
`X` are [experts, inputs, outputs], and a name map tells one from the other by the name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import require_known
from decodax.models.checkpoints.formats.unpacking import halves
from decodax.models.checkpoints.safetensors_files import Entry, as_matrix

_BYTES = 16  # a group: 32 numbers of four bits that share a scale
_BLOCKS, _SCALES = "_blocks", "_scales"
_FIELDS = frozenset({"quant_method", "dequantize", "modules_to_not_convert"})

_ALL_BYTES = np.arange(256, dtype=np.uint8)
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# Both numbers of a byte, the low half first, as one item of eight bytes: looked up six times faster than two of four.
_PAIRS = FP4_VALUES[np.stack([_ALL_BYTES & 15, _ALL_BYTES >> 4], axis=1)].view(np.uint64)[:, 0]
_SCALE_VALUES = _ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)  # 2^(byte - 127), and 255 is NaN


@dataclass(frozen=True, eq=False)
class Mxfp4(Packed):
    """Numbers of four bits (sign, two bits of exponent, one of mantissa), 32 in a row with one scale 2^(byte - 127).

    Its parts: codes are the four bits, scales [rows, inputs / 32] float8_e8m0fnu.

    blocks: bytes [.., rows, groups, 16], the low half first.
    scales: bytes [.., rows, groups].
    """

    blocks: np.ndarray
    scales: np.ndarray

    def parts(self, index: slice | np.ndarray) -> Parts:
        octets = self.blocks.reshape(-1, self.shape[-1] // 2)[index]
        scales = as_matrix(self.scales)[index].view(ml_dtypes.float8_e8m0fnu)
        return Parts(halves(octets), scales, 2 * _BYTES, values=FP4_VALUES)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        num_groups = self.scales.shape[-1]
        values = _PAIRS[self.blocks.reshape(-1, num_groups, _BYTES)[index]].view(np.float32)
        with np.errstate(all="ignore"):
            values *= _SCALE_VALUES[as_matrix(self.scales)[index]][..., None]
        return values.reshape(-1, self.shape[-1])


def is_packed_name(name: str) -> bool:
    """Whether a name in a family's name map is that of packed numbers."""
    return name.endswith(_BLOCKS)


def _settings(field: Mapping[str, Any]) -> None:
    require_known(field, _FIELDS, "quantization_config with quant_method mxfp4")


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    return (name, name.removesuffix(_BLOCKS)) if stored[name].kind == "U8" and is_packed_name(name) else None


def _tensor(pieces: Pieces, settings: None) -> PackedTensor:
    blocks, tensor = pieces.take(_BLOCKS, ["U8"], "codes"), printable(pieces.name)
    if len(blocks.shape) < 3 or blocks.shape[-1] != _BYTES:
        raise ValueError(f"misshapen: {tensor} {list(blocks.shape)}, expected [.., rows, groups, {_BYTES}]")
    what = f"one scale for each group of {tensor} {list(blocks.shape)}"
    scales = pieces.take(_SCALES, ["U8"], what, blocks.shape[:-1])
    shape = (*scales.shape[:-1], scales.shape[-1] * 2 * _BYTES)
    return Mxfp4(pieces.label, shape, pieces.mappings, blocks.array(np.uint8), scales.array(np.uint8))


FORMAT = Format(_settings, _packed_as, (_BLOCKS, _SCALES), _tensor)
