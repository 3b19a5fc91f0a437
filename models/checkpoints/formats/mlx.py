"""Reads MLX's affine weights: whole numbers with a scale and an offset per group of inputs.

As `mlx.core.quantize` stores them (https://ml-explore.github.io/mlx, operation `quantize`), embeddings too:

    X.weight  uint32 [.., outputs, inputs * bits / 32]    codes, the first in the lowest bits of a word
    X.scales  float [.., outputs, groups]
    X.biases  float [.., outputs, groups]

Number = scale * code + bias in float32: one product, then one sum. MLX computes in the dtype of the scales, and rounds
each of the two to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import choice, require_known
from decodax.models.checkpoints.formats.unpacking import codes_of
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry, as_matrix

_WHERE = "with the quantization of MLX"
_WEIGHT = "weight"
_FIELDS = frozenset({"group_size", "bits", "mode"})


@dataclass(frozen=True)
class Grouping:
    """bits: of a code. group_size: inputs that share a scale."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Settings:
    """grouping: of all modules but those named. of_module: of those, by name; None: the module is plain."""

    grouping: Grouping
    of_module: Mapping[str, Grouping | None]


@dataclass(frozen=True, eq=False)
class AffineTensor(Packed):
    """Number [o, i] = code[o, i] * scale[o, g] + bias[o, g], where g is i's group.

    Its parts: codes uint8 [rows, inputs]; scales and offsets [rows, groups] in the stored dtype.

    words, scales, biases: as stored.
    bits: of a code.
    """

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    def parts(self, index: slice | np.ndarray) -> Parts:
        return Parts(
            codes_of(as_matrix(self.words)[index], self.bits),
            as_matrix(self.scales)[index],
            self.shape[-1] // self.scales.shape[-1],
            offsets=as_matrix(self.biases)[index],
        )


def _settings(field: Mapping[str, Any]) -> Settings:
    modules = {name: value for name, value in field.items() if isinstance(value, Mapping | bool)}
    plain = {name: value for name, value in field.items() if name not in modules}
    given = {name: _grouping(value) for name, value in modules.items() if isinstance(value, Mapping)}
    # true is the default grouping, as for a module that is not named.
    return Settings(_grouping(plain), given | {name: None for name, value in modules.items() if value is False})


def _grouping(field: Mapping[str, Any]) -> Grouping:
    require_known(field, _FIELDS, f"quantization {_WHERE}")
    choice(field, "mode", ("affine",), "affine", _WHERE)
    bits = choice(field, "bits", (2, 4, 8), None, _WHERE)
    return Grouping(bits, choice(field, "group_size", (32, 64, 128), None, _WHERE))


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    is_packed = stored[name].kind == "U32" and name.endswith(f".{_WEIGHT}")
    return (name, name.removesuffix(_WEIGHT)) if is_packed else None


def _tensor(pieces: Pieces, settings: Settings) -> PackedTensor:
    tensor, module = printable(pieces.name), pieces.prefix.removesuffix(".")
    grouping = settings.of_module.get(module, settings.grouping)
    if grouping is None:
        raise ValueError(f"not in config.json: {tensor} is packed, but quantization has {printable(module)}: false")
    words = pieces.take(_WEIGHT, ["U32"], "codes")
    if len(words.shape) < 2:
        raise ValueError(f"misshapen: {tensor} {list(words.shape)}, expected [.., outputs, inputs * bits / 32]")
    shape = (*words.shape[:-1], words.shape[-1] * 32 // grouping.bits)
    if not shape[-1] or shape[-1] % grouping.group_size:
        raise ValueError(
            f"misshapen: {tensor} has {shape[-1]} inputs of {grouping.bits} bits, which quantization's group_size = "
            f"{grouping.group_size} does not divide: correct bits and group_size in config.json"
        )
    grouped = (*shape[:-1], shape[-1] // grouping.group_size)
    what = f"for each {grouping.group_size} inputs (group_size) of {tensor} {list(shape)} of {grouping.bits} bits"
    scales = pieces.take("scales", PLAIN_DTYPES, f"one scale {what}", grouped)
    biases = pieces.take("biases", PLAIN_DTYPES, f"one bias {what}", grouped)
    arrays = (words.array(np.uint32), scales.array(scales.dtype), biases.array(biases.dtype))
    return AffineTensor(pieces.label, shape, pieces.mappings, *arrays, grouping.bits)


FORMAT = Format(_settings, _packed_as, (_WEIGHT, "scales", "biases"), _tensor)
