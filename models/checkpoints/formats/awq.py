"""Reads AWQ weights: numbers of four bits with a scale and a zero point per group of inputs.

AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978; the files are those of
AutoAWQ, version "gemm":

    X.qweight  int32 [inputs, outputs / 8]    codes; a word holds 8 outputs in the order 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros   int32 [groups, outputs / 8]    zero points, in the same order
    X.scales   float [groups, outputs]

Number = (code - zero) * scale in float32, which is exact for scales in 16 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import choice, empty, require_known, size, texts
from decodax.models.checkpoints.formats.gptq import WORDS, num_groups
from decodax.models.checkpoints.formats.unpacking import columns_of
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry

_WHERE = "with quant_method awq"
_QWEIGHT = "qweight"
_BITS, _PER_WORD = 4, 8
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of outputs 0 to 7 in their word
_FORMS = ("version", "format", "checkpoint_format")
_UNSUPPORTED = ("dynamic", "desc_act")  # other bits in some layers; groups of inputs that are not consecutive
_FIELDS = frozenset(
    {
        *("quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", *_FORMS),
        *("modules_to_not_convert", *_UNSUPPORTED),
        # how the weights were made, or how a program runs them
        *("backend", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "sym", "lm_head", "meta"),
        *("pack_dtype", "method"),
    }
)


@dataclass(frozen=True, eq=False)
class AWQTensor(Packed):
    """Number [o, i] = (code[i, o] - zero[g, o]) * scale[g, o], where g is i's group.

    Its parts: codes uint8 [rows, inputs]; scales [rows, groups] in the stored dtype; zeros uint8 [rows, groups].

    words, zero_words, scales: as stored, words as uint32.
    """

    words: np.ndarray
    zero_words: np.ndarray
    scales: np.ndarray

    def parts(self, index: slice | np.ndarray) -> Parts:
        outputs = self.row_numbers(index)
        codes, zeros = (columns_of(words, outputs, _BITS, _PLACES).T for words in (self.words, self.zero_words))
        return Parts(
            np.ascontiguousarray(codes), self.scales[:, index].T, self.shape[1] // len(self.scales), zeros=zeros
        )


def _settings(field: Mapping[str, Any]) -> int:
    """The group size."""
    require_known(field, _FIELDS, f"quantization_config {_WHERE}")
    empty(field, _UNSUPPORTED, _WHERE)
    field = {"bits": field.get("w_bit"), "group_size": field.get("q_group_size"), **field}
    choice(field, "bits", (_BITS,), None, _WHERE)
    choice(field, "zero_point", (True,), True, f"{_WHERE} (gemm files have zero points)")
    for name in _FORMS:
        choice(field, name, ("gemm", "GEMM"), "gemm", _WHERE)
    texts(field, "modules_to_not_convert", _WHERE)  # the files say it by themselves
    return size(field, "group_size", None, _WHERE, or_minus_one=True)


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    prefix = name.removesuffix(_QWEIGHT)
    return (f"{prefix}weight", prefix) if name.endswith(f".{_QWEIGHT}") else None


def _tensor(pieces: Pieces, group_size: int) -> PackedTensor:
    words = pieces.matrix(_QWEIGHT, WORDS, f"[inputs, outputs / {_PER_WORD}]")
    num_inputs, num_outputs = words.shape[0], words.shape[1] * _PER_WORD
    what = f"of {printable(pieces.name)} {[num_outputs, num_inputs]}"
    groups = num_groups(num_inputs, group_size, printable(pieces.name))
    scales = pieces.take("scales", PLAIN_DTYPES, f"one scale for each group {what}", (groups, num_outputs))
    zeros = pieces.take("qzeros", WORDS, f"the zero points {what}", (groups, words.shape[1]))
    arrays = (words.array(np.uint32), zeros.array(np.uint32), scales.array(scales.dtype))
    return AWQTensor(pieces.label, (num_outputs, num_inputs), pieces.mappings, *arrays)


FORMAT = Format(_settings, _packed_as, (_QWEIGHT, "qzeros", "scales"), _tensor)
