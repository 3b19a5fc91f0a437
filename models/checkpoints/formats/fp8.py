"""Reads FP8 weights with a scale per block: `X` in F8_E4M3 beside `X_scale_inv`.

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3. There the activations are rounded to FP8 as well; here
they are not, only the weights are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import require_known
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry, as_matrix

FP8_KIND = "F8_E4M3"
FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_SCALE_DTYPES = PLAIN_DTYPES | {"F8_E8M0": ml_dtypes.float8_e8m0fnu}
_WHERE = "with quant_method fp8"
_FIELDS = frozenset(
    {
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
)


@dataclass(frozen=True, eq=False)
class BlockScaled(Packed):
    """FP8: number [i, j] of the last two axes is value[i, j] x scale[i // block[0], j // block[1]].

    Its parts: codes are the bytes of float8_e4m3fn, scales [rows, blocks of inputs] the row's own.

    codes: the bytes.
    scales: one for each block, also for those that the edge cuts.
    block: (outputs, inputs) per scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]

    def parts(self, index: slice | np.ndarray) -> Parts:
        matrix, row = np.divmod(self.row_numbers(index), self.shape[-2])
        scales = as_matrix(self.scales)[matrix * self.scales.shape[-2] + row // self.block[0]]
        return Parts(as_matrix(self.codes)[index], scales, self.block[1], values=FP8_VALUES)


def _settings(field: Mapping[str, Any]) -> tuple[int, int]:
    """The block size."""
    require_known(field, _FIELDS, f"quantization_config {_WHERE}")
    for name, known in {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}.items():
        if field.get(name, known) != known:
            raise ValueError(
                f"quantization_config.{name} must be {known} or absent {_WHERE}, got {printable(repr(field[name]))}"
            )
    block = field.get("weight_block_size", [128, 128])
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(
            f"quantization_config.weight_block_size must be two whole numbers from 1 on {_WHERE} "
            f"(outputs and inputs that share a scale), got {printable(repr(block))}"
        )
    return block[0], block[1]


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    is_scale = name.endswith(".weight_scale")  # of NVFP4
    return (name, name) if stored[name].kind == FP8_KIND and not is_scale else None


def _tensor(pieces: Pieces, block: tuple[int, int]) -> PackedTensor:
    codes, tensor = pieces.take("", [FP8_KIND], "codes"), printable(pieces.name)
    if len(codes.shape) < 2:
        raise ValueError(f"misshapen: {tensor} {list(codes.shape)} is stored as fp8, which needs two axes or more")
    shape = (*codes.shape[:-2], *(-(-size // step) for size, step in zip(codes.shape[-2:], block, strict=True)))
    steps = " x ".join(map(str, block))
    what = f"one scale for each {steps} (weight_block_size) of {tensor} {list(codes.shape)}"
    scales = pieces.take("_scale_inv", _SCALE_DTYPES, what, shape)
    factors = scales.array(_SCALE_DTYPES[scales.kind])
    return BlockScaled(pieces.label, codes.shape, pieces.mappings, codes.array(np.uint8), factors, block)


FORMAT = Format(_settings, _packed_as, ("", "_scale_inv"), _tensor)
