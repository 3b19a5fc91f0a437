"""Gives the tensors of a GGUF file Hugging Face's names, shapes and orders of rows."""

import re
from collections.abc import Iterator, Mapping

from decodax.models.checkpoints.gguf.architectures import Architecture
from decodax.models.checkpoints.gguf.reordered import HalvesOfHeads, LessOne, OneOfStack, OneRow
from decodax.models.checkpoints.gguf.tensors import BlockTensor, GGUFTensor

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_IN_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
_QUERY = "attn_q."


def named_tensors(
    tensors: Mapping[str, BlockTensor], architecture: Architecture, num_heads: int, num_kv_heads: int
) -> dict[str, GGUFTensor]:
    """The tensors by Hugging Face's names, in the order of the file; one of an unknown name keeps it.

    The factors of the rotation are left out: they are part of the config.
    """
    named: dict[str, GGUFTensor] = {}
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        in_layer = _IN_LAYER.fullmatch(name)
        if name in _OUTER:
            named[_OUTER[name]] = _norm(name, tensor, architecture)
        elif in_layer is None:
            named[name] = tensor
        else:
            layer, inner = in_layer.groups()
            heads = num_heads if inner.startswith(_QUERY) else num_kv_heads
            ordered = _ordered(inner, tensor, architecture, heads)
            named |= dict(_in_layer(f"blk.{layer}.", f"model.layers.{layer}.", inner, ordered, architecture, tensors))
    return named


def _norm(name: str, tensor: GGUFTensor, architecture: Architecture) -> GGUFTensor:
    return LessOne(tensor) if architecture.unit_offset and name.endswith("norm.weight") else tensor


def _ordered(inner: str, tensor: BlockTensor, architecture: Architecture, heads: int) -> GGUFTensor:
    """A tensor of a layer with its numbers in Hugging Face's order."""
    if inner in architecture.paired_heads and tensor.shape and tensor.shape[0] % (2 * heads) == 0:  # else refused
        return HalvesOfHeads(tensor, heads)
    if inner in architecture.one_row and len(tensor.shape) == 1:
        return OneRow(tensor)
    return _norm(inner, tensor, architecture)


def _in_layer(
    ours: str,
    theirs: str,
    inner: str,
    tensor: GGUFTensor,
    architecture: Architecture,
    tensors: Mapping[str, BlockTensor],
) -> Iterator[tuple[str, GGUFTensor]]:
    """What a tensor of a layer is in Hugging Face's names.

    ours, theirs: the layer's prefix in GGUF and in Hugging Face.
    inner: the tensor's name in the layer.
    """
    for name, (combined, first, second) in architecture.combined.items():
        if inner in (first, second):
            pair = tensors.get(ours + first), tensors.get(ours + second)
            if pair[0] is None or pair[1] is None or not combined.fit(*pair):
                break  # the tensor that is there keeps its name, and is reported
            if inner == first:
                yield theirs + name, combined(*pair)
            return
    name = architecture.tensors.get(inner)
    if name is None:
        yield ours + inner, tensor
    elif "{}" not in name:
        yield theirs + name, tensor
    else:
        for place in range(tensor.shape[0] if len(tensor.shape) > 1 else 0):
            yield theirs + name.format(place), OneOfStack(tensor, place)
