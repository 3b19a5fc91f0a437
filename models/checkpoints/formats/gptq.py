"""Reads GPTQ weights: whole numbers with a scale and a zero point per group of inputs.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323; the files are those
of AutoGPTQ and GPTQModel, which the Hugging Face hub's models have:

    X.qweight  int32 [inputs * bits / 32, outputs]    codes, 32 / bits inputs in a word, the first in its lowest bits
    X.qzeros   int32 [groups, outputs * bits / 32]    zero points, packed along the outputs
    X.scales   float [groups, outputs]
    X.g_idx    int32 [inputs]                         the group of each input; optional

Number = (code - zero) * scale in float32, which is exact for scales in 16 bits. Format "gptq" stores zero - 1: the 1 is
added after unpacking, so that 16 is possible with 4 bits, as in the kernels of exllama and vLLM. "gptq_v2" stores the
zero point itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Format, Packed, PackedTensor, Parts, Pieces
from decodax.models.checkpoints.formats.fields import choice, empty, require_known, size
from decodax.models.checkpoints.formats.unpacking import codes_of, columns_of
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry

WORDS = ("I32", "U32")
_WHERE = "with quant_method gptq"
_QWEIGHT = "qweight"
_FORMATS = ("gptq", "gptq_v2")
_UNSUPPORTED = ("dynamic", "is_marlin_format")  # other bits in some layers; another order of the codes
_FIELDS = frozenset(
    {
        *("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "lm_head"),
        *_UNSUPPORTED,
        # how the weights were made, or how a program runs them
        *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse"),
        *("model_name_or_path", "model_file_base_name", "meta", "pack_dtype", "quantizer", "tokenizer", "dataset"),
        *("use_cuda_fp16", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "pack_impl"),
        *("batch_size", "pad_token_id", "use_exllama", "disable_exllama", "exllama_config", "max_input_length"),
        *("cache_block_outputs", "modules_in_block_to_quantize", "modules_to_not_convert", "backend", "method"),
        *("quant_type", "offload_to_disk", "offload_to_disk_path", "gptaq", "rotation", "adapter", "init_method"),
    }
)


@dataclass(frozen=True)
class Settings:
    """What the config says of all weights.

    bits: of a code.
    group_size: inputs that share a scale; -1: all.
    ordered: the groups are of inputs that are not consecutive (activation ordering).
    zero_offset: what is added to a stored zero point.
    """

    bits: int
    group_size: int
    ordered: bool
    zero_offset: int


@dataclass(frozen=True, eq=False)
class GPTQTensor(Packed):
    """Number [o, i] = (code[i, o] - zero[g, o]) * scale[g, o], where g is i's group.

    Its parts: codes uint8 [rows, inputs]; scales [rows, groups] in the stored dtype; zeros int16 [rows, groups], with
    the 1 added; groups of consecutive inputs, or `group_of` each input.

    words, zero_words, scales: as stored, words as uint32.
    group_of: the group of each input; None: consecutive groups.
    settings: of the checkpoint.
    """

    words: np.ndarray
    zero_words: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray | None
    settings: Settings

    def parts(self, index: slice | np.ndarray) -> Parts:
        bits, outputs = self.settings.bits, self.row_numbers(index)
        zeros = columns_of(self.zero_words, outputs, bits).astype(np.int16)
        zeros += np.int16(self.settings.zero_offset)
        return Parts(
            codes_of(self.words[:, index].T, bits),
            self.scales[:, index].T,
            self.shape[1] // len(self.scales),
            zeros=zeros.T,
            group_of=self.group_of,
        )


def _settings(field: Mapping[str, Any]) -> Settings:
    require_known(field, _FIELDS, f"quantization_config {_WHERE}")
    empty(field, _UNSUPPORTED, _WHERE)
    bits = choice(field, "bits", (2, 4, 8), None, _WHERE)
    choice(field, "sym", (True, False, None), None, _WHERE)  # the zero points say it
    ordered = choice(field, "desc_act", (True, False, None), None, _WHERE) is True
    formats = [choice(field, name, (*_FORMATS, None), None, _WHERE) for name in ("checkpoint_format", "format")]
    group_size = size(field, "group_size", None, _WHERE, or_minus_one=True)
    return Settings(bits, group_size, ordered, 0 if "gptq_v2" in formats else 1)


def _packed_as(name: str, stored: Mapping[str, Entry]) -> tuple[str, str] | None:
    prefix = name.removesuffix(_QWEIGHT)
    return (f"{prefix}weight", prefix) if name.endswith(f".{_QWEIGHT}") else None


def num_groups(num_inputs: int, group_size: int, tensor: str) -> int:
    """The groups of a row of inputs; ValueError if the group size does not divide it. -1: one group."""
    if group_size == -1:
        return 1
    if num_inputs % group_size:
        raise ValueError(
            f"misshapen: {tensor} has {num_inputs} inputs, which quantization_config.group_size = {group_size} does "
            "not divide: correct it in config.json, or use a checkpoint with plain weights"
        )
    return num_inputs // group_size


def _tensor(pieces: Pieces, settings: Settings) -> PackedTensor:
    per_word, tensor = 32 // settings.bits, printable(pieces.name)
    words = pieces.matrix(_QWEIGHT, WORDS, f"[inputs / {per_word}, outputs], codes of {settings.bits} bits")
    num_inputs, num_outputs = words.shape[0] * per_word, words.shape[1]
    if num_outputs % per_word:
        raise ValueError(
            f"misshapen: {printable(pieces.prefix + _QWEIGHT)} {list(words.shape)}, expected outputs that are a "
            f"multiple of {per_word} (codes of {settings.bits} bits in a word)"
        )
    groups, what = num_groups(num_inputs, settings.group_size, tensor), f"of {tensor} {[num_outputs, num_inputs]}"
    scales = pieces.take("scales", PLAIN_DTYPES, f"one scale for each group {what}", (groups, num_outputs))
    zeros = pieces.take("qzeros", WORDS, f"the zero points {what}", (groups, num_outputs // per_word))
    group_of = None
    if pieces.has("g_idx") or (settings.ordered and groups > 1):
        group_of = _group_of(pieces.take("g_idx", ["I32", "I64"], f"the group of each input {what}", (num_inputs,)))
        if group_of.min() < 0 or group_of.max() >= groups:
            raise ValueError(
                f"misshapen: {printable(pieces.prefix)}g_idx must hold groups from 0 to {groups - 1}, got "
                f"{group_of.min()} to {group_of.max()}: download the checkpoint again"
            )
        if np.array_equal(group_of, np.arange(num_inputs) // (num_inputs // groups)):
            group_of = None
    arrays = (words.array(np.uint32), zeros.array(np.uint32), scales.array(scales.dtype), group_of)
    return GPTQTensor(pieces.label, (num_outputs, num_inputs), pieces.mappings, *arrays, settings)


def _group_of(piece: Any) -> np.ndarray:
    return piece.array(np.int32 if piece.kind == "I32" else np.int64).astype(np.int64)


FORMAT = Format(_settings, _packed_as, (_QWEIGHT, "qzeros", "scales", "g_idx"), _tensor)
