"""Finds which tensor name map of a model a checkpoint follows, and reports every tensor that does not fit."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.contract import Unreadable
from decodax.models.checkpoints.formats.view import Quantization, is_packed
from decodax.models.checkpoints.name_map import NameMap, NameMaps, Shape, TensorSlice
from decodax.models.checkpoints.name_prefix import BODY, TensorNames, find_names
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.checkpoints.weight_formats import StoredTensor
from decodax.models.families.contract import ParameterPath

_COMPARED_NUMBERS = 2**18  # at once
Filled = dict[ParameterPath, list[tuple[TensorSlice, StoredTensor]]]  # what fills each parameter

_COMPARED_NUMBERS = 2**18  # at once

# Stored beside the weights by some programs: nothing is lost without them.
REDUNDANT_SUFFIXES = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "self_attn.masked_bias"),
    # scales of programs that round cached keys and values to FP8
    *(f"self_attn.{letter}_{kind}" for letter in "qkv" for kind in ("scale", "zero_point")),
    # of MiniMax's lightning attention
    *("self_attn.slope_rate", "self_attn.query_decay", "self_attn.key_decay", "self_attn.diagonal_decay"),
)


@dataclass(frozen=True)
class Expected:
    """What the files of a checkpoint should hold.

    name_maps: of every parameter.
    shapes: of every parameter.
    quantization: the weight format that the config names; None: plain weights.
    tied_head: the names of the head and of the embedding that it must equal where both are stored.
    elsewhere: a regular expression for the full names of tensors that belong to something else.
    body_prefix: of all names but the head's.
    """

    name_maps: Mapping[ParameterPath, NameMaps]
    shapes: Mapping[ParameterPath, Shape]
    quantization: Quantization | None = None
    tied_head: tuple[str, str] | None = None
    elsewhere: str | None = None
    body_prefix: str = BODY


@dataclass(frozen=True)
class Match:
    """The stored tensors matched with those expected.

    names: the prefixes of the files.
    nearest: of each parameter's name maps, the one most of whose tensors are stored.
    tensors: the stored tensors that are used, by name.
    misshapen: the shape of a tensor and the expected one, by name.
    problems: a line for each tensor that is missing, surplus or unreadable.
    """

    names: TensorNames
    nearest: Mapping[ParameterPath, NameMap]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)  # keeps the order, and names once what two parameters miss

    def report(self) -> list[str]:
        """A line for each tensor that does not fit."""
        lines = [
            f"misshapen: {printable(name)} {list(shape)}, expected {list(expected)}"
            for name, (shape, expected) in self.misshapen.items()
        ]
        return [*lines, *self.problems]

    def filled(self, stored: Mapping[str, Entry]) -> Filled:
        """The stored tensors that fill each parameter, in the order of the files."""
        position = {name: index for index, name in enumerate(stored)}
        nearest = self.nearest
        in_order = sorted(nearest, key=lambda path: min(position[tensor_slice.name] for tensor_slice in nearest[path]))
        return {
            path: [(tensor_slice, self.tensors[tensor_slice.name]) for tensor_slice in nearest[path]]
            for path in in_order
        }


def match_tensors(stored: Mapping[str, Entry], expected: Expected) -> Match:
    """Compares the stored tensors, as `readable` presents them, with the expected ones."""
    names = find_names(stored, tensor_names(expected.name_maps), expected.body_prefix)
    name_maps = {path: _in_file(several, names) for path, several in expected.name_maps.items()}
    nearest = {path: max(several, key=lambda name_map: _share(name_map, stored)) for path, several in name_maps.items()}
    match = Match(names, nearest)
    for path, name_map in nearest.items():
        _check_places(path, name_map, expected.shapes[path])
        match.problems.update(dict.fromkeys(_missing(name_map, name_maps[path], expected.shapes[path], stored)))
    _read_forms(stored, expected, match)
    match.problems.update(dict.fromkeys(_surplus(stored, name_maps, expected, match)))
    if expected.quantization is not None and not any(map(is_packed, stored.values())):
        match.problems[
            f"quantization_config in config.json says {expected.quantization.method}, but no tensor is stored so: "
            "remove it from there if the weights are plain"
        ] = None
    return match


def tensor_names(name_maps: Mapping[ParameterPath, NameMaps]) -> set[str]:
    """The names of all tensors that may fill these parameters."""
    return {tensor_slice.name for several in name_maps.values() for name_map in several for tensor_slice in name_map}


def _in_file(name_maps: NameMaps, names: TensorNames) -> NameMaps:
    """The same name maps with the names that the files have."""
    if names.are_expected:
        return name_maps
    return tuple(
        tuple(replace(tensor_slice, name=names.in_file(tensor_slice.name)) for tensor_slice in name_map)
        for name_map in name_maps
    )


def _share(name_map: NameMap, stored: Mapping[str, Entry]) -> float:
    return sum(tensor_slice.name in stored for tensor_slice in name_map) / len(name_map)


def _check_places(path: ParameterPath, name_map: NameMap, shape: Shape) -> None:
    """A name map fills a parameter with one slice, or each index of its first axis once."""
    places = [tensor_slice.at for tensor_slice in name_map]
    if places != [None] and places != list(range(shape[0])):
        raise ValueError(
            f"the name map of {'/'.join(path)} {list(shape)} must be one tensor slice, or one for each index of the "
            f"first axis in order, got slices for {places}"
        )


def _missing(name_map: NameMap, name_maps: NameMaps, shape: Shape, stored: Mapping[str, Entry]) -> list[str]:
    """A line for each tensor that this name map lacks; the first also names the alternatives if none is stored."""
    absent = [tensor_slice for tensor_slice in name_map if tensor_slice.name not in stored]
    lines = [f"missing: {tensor_slice.name} {list(tensor_slice.stored_shape(shape))}" for tensor_slice in absent]
    if not any(tensor_slice.name in stored for several in name_maps for tensor_slice in several):
        others = [several[0] for several in name_maps if several is not name_map]
        lines[0] += "".join(
            f", or {tensor_slice.name} {list(tensor_slice.stored_shape(shape))}" for tensor_slice in others
        )
    return lines


def _read_forms(stored: Mapping[str, Entry], expected: Expected, match: Match) -> None:
    """Adds every tensor that is used, and the problems of those that are unreadable or have a wrong shape."""
    for path, name_map in match.nearest.items():
        for tensor_slice in name_map:
            tensor = stored.get(tensor_slice.name)
            if isinstance(tensor, Unreadable):
                match.problems[tensor.problem] = None
            elif tensor is not None:
                assert isinstance(tensor, StoredTensor)
                match.tensors[tensor_slice.name] = tensor
                target = tensor_slice.stored_shape(expected.shapes[path])
                if tensor.shape != target:
                    match.misshapen[tensor_slice.name] = (tensor.shape, target)


def _surplus(
    stored: Mapping[str, Entry], name_maps: Mapping[ParameterPath, NameMaps], expected: Expected, match: Match
) -> list[str]:
    """A line for each stored tensor that fills nothing, or is a second copy that differs from the first."""
    used = {
        tensor_slice.name
        for name_map in match.nearest.values()
        for tensor_slice in name_map
        if tensor_slice.name in stored
    }
    known = tensor_names(name_maps)
    tied_head = None if expected.tied_head is None else [match.names.in_file(name) for name in expected.tied_head]
    lines = []
    for name, tensor in stored.items():
        if name in used or name.endswith(REDUNDANT_SUFFIXES) or _is_empty_bias(name, stored):
            continue
        if tied_head is not None and name == tied_head[0]:
            if not _equal(tensor, stored[tied_head[1]]):
                lines.append(
                    f"{name} differs from the embedding although the config ties them: "
                    "set tie_word_embeddings to false in config.json to use it, or remove it from the file"
                )
        elif name in known:
            lines.append(
                f"surplus: {name} {list(tensor.shape)}, of another name map than the rest: keep one of the two"
            )
        elif expected.elsewhere is None or not re.fullmatch(expected.elsewhere, match.names.expected(name)):
            lines.append(f"surplus: {printable(name)} {list(tensor.shape)}")
    return lines


def _is_empty_bias(name: str, stored: Mapping[str, Entry]) -> bool:
    """Whether a tensor is the bias of zeros that some programs store beside every packed weight (GPTQ-for-LLaMa)."""
    weight, bias = stored.get(f"{name.removesuffix('bias')}weight"), stored[name]
    if not name.endswith(".bias") or weight is None or not is_packed(weight):
        return False
    return isinstance(bias, StoredTensor) and len(bias.shape) == 1 and not bias.rows(slice(None)).any()


def _equal(one: Entry, other: Entry) -> bool:
    """Whether two stored tensors have the same kind, shape and bits."""
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return False  # one of them cannot be read
    if one.kind != other.kind or one.shape != other.shape:
        return False
    step = max(1, _COMPARED_NUMBERS // max(math.prod(one.shape[-1:]), 1))
    spans = (slice(start, start + step) for start in range(0, math.prod(one.shape[:-1]), step))
    return all(one.rows(span).tobytes() == other.rows(span).tobytes() for span in spans)
