"""Finds which of the layouts that a model may be stored in a checkpoint has, and reports all that does not fit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from decodax.models.families._contract import ParameterPath
from decodax.models.sources import Layout, Layouts, Shape, Source, renamed
from decodax.models.stored_files import Entry, RawTensor
from decodax.models.stored_formats import Quantization, StoredTensor, interpret, is_stored_as, scales_of

Filled = dict[ParameterPath, list[tuple[Source, StoredTensor]]]  # what each parameter is filled from

# Stored beside the weights by some programs, and derived from the config: nothing is lost without them.
REDUNDANT_SUFFIXES = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "self_attn.masked_bias"),
    # of MiniMax's lightning attention
    *("self_attn.slope_rate", "self_attn.query_decay", "self_attn.key_decay", "self_attn.diagonal_decay"),
)
_BASE_PREFIX = "model."  # what the names have in front, except in the file of a base model

_COMPARED_BYTES = 2**20
_MOST_LINES = 50  # of a report: a model of experts has tens of thousands of tensors


@dataclass(frozen=True)
class Expected:
    """What the files of a checkpoint should hold.

    layouts and shapes: of every parameter. tied_head: the names of the head and of the embedding that it must equal
    where both are stored. elsewhere: a regular expression for the whole names of tensors that belong to something else.
    """

    layouts: Mapping[ParameterPath, Layouts]
    shapes: Mapping[ParameterPath, Shape]
    quantization: Quantization | None = None
    tied_head: tuple[str, str] | None = None
    elsewhere: str | None = None


def find_sources(stored: Mapping[str, Entry], expected: Expected, where: str) -> Filled:
    """The stored tensors that fill each parameter, in the order of the files.

    Of a parameter's layouts, the one is taken of which most is there. Raises ValueError that lists every missing,
    surplus, misshapen or unreadable tensor; `where` names the files.
    """
    layouts, prefix = dict(expected.layouts), ""
    if not any(name.startswith(_BASE_PREFIX) for name in stored):
        prefix = _BASE_PREFIX
        layouts = {path: renamed(several, without=prefix) for path, several in layouts.items()}
    nearest = {path: max(several, key=lambda layout: _share(layout, stored)) for path, several in layouts.items()}
    problems: dict[str, None] = {}  # a dictionary keeps the order, and names once what two parameters miss
    for path, layout in nearest.items():
        _check_places(path, layout, expected.shapes[path])
        problems |= dict.fromkeys(_missing(layout, layouts[path], expected.shapes[path], stored))
    tensors = _tensors(stored, nearest, expected, problems)
    problems |= dict.fromkeys(_surplus(stored, layouts, nearest, expected, prefix))
    method = None if expected.quantization is None else expected.quantization.method
    if method is not None and not is_stored_as(method, stored):
        problems[
            f"quantization_config in config.json says {method}, but no tensor is stored so: remove it from there if "
            "the weights are plain"
        ] = None
    if problems:
        lines = [f"\n  - {line}" for line in problems]
        rest = f"\n  and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
        raise ValueError(f"the weights in {where} do not fit its config.json:{''.join(lines[:_MOST_LINES])}{rest}")
    position = {name: index for index, name in enumerate(stored)}
    in_order = sorted(nearest, key=lambda path: min(position[source.name] for source in nearest[path]))
    return {path: [(source, tensors[source.name]) for source in nearest[path]] for path in in_order}


def _share(layout: Layout, stored: Mapping[str, Entry]) -> float:
    return sum(source.name in stored for source in layout) / len(layout)


def _check_places(path: ParameterPath, layout: Layout, shape: Shape) -> None:
    """A layout fills a parameter as a whole, or each index of its first axis once."""
    places = [source.at for source in layout]
    if places != [None] and places != list(range(shape[0])):
        raise ValueError(
            f"the layout of {'/'.join(path)} {list(shape)} must be one source, or one for each index of the first "
            f"axis in order, got sources for {places}"
        )


def _missing(layout: Layout, layouts: Layouts, shape: Shape, stored: Mapping[str, Entry]) -> list[str]:
    """A line for each tensor that this layout lacks; the first also names the others where nothing tells them apart."""
    lines = [
        f"missing: {source.name} {list(source.stored_shape(shape))}" for source in layout if source.name not in stored
    ]
    if not any(source.name in stored for several in layouts for source in several):
        others = [several[0] for several in layouts if several is not layout]
        lines[0] += "".join(f", or {source.name} {list(source.stored_shape(shape))}" for source in others)
    return lines


def _tensors(
    stored: Mapping[str, Entry],
    nearest: Mapping[ParameterPath, Layout],
    expected: Expected,
    problems: dict[str, None],
) -> dict[str, StoredTensor]:
    """Every tensor that is used, by name, in the form it is stored in; adds those of a wrong shape or form."""
    tensors: dict[str, StoredTensor] = {}
    for path, layout in nearest.items():
        for source in layout:
            if source.name not in stored:
                continue
            try:
                if source.name not in tensors:
                    tensors[source.name] = interpret(source.name, stored, expected.quantization)
            except ValueError as error:
                problems[str(error)] = None
                continue
            shape, wanted = tensors[source.name].shape, source.stored_shape(expected.shapes[path])
            if shape != wanted:
                problems[f"misshapen: {source.name} {list(shape)}, expected {list(wanted)}"] = None
    return tensors


def _surplus(
    stored: Mapping[str, Entry],
    layouts: Mapping[ParameterPath, Layouts],
    nearest: Mapping[ParameterPath, Layout],
    expected: Expected,
    prefix: str,
) -> list[str]:
    """A line for each stored tensor that fills nothing, or is a second copy that differs from the first."""
    used = {source.name for layout in nearest.values() for source in layout if source.name in stored}
    used |= {scales for name in used if (scales := scales_of(name, stored)) is not None}
    known = {source.name for several in layouts.values() for layout in several for source in layout}
    lines = []
    for name, tensor in stored.items():
        if name in used or name.endswith(REDUNDANT_SUFFIXES):
            continue
        if expected.tied_head is not None and name == expected.tied_head[0]:
            if not _equal(tensor, stored[expected.tied_head[1].removeprefix(prefix)]):
                lines.append(
                    f"{name} differs from the embedding although the config ties them: "
                    "set tie_word_embeddings to false in config.json to use it, or remove it from the file"
                )
        elif name in known:
            lines.append(f"surplus: {name} {list(tensor.shape)}, of another layout than the rest: keep one of the two")
        elif expected.elsewhere is None or not re.fullmatch(expected.elsewhere, prefix + name):
            lines.append(f"surplus: {name} {list(tensor.shape)}")
    return lines


def _equal(one: Entry, other: Entry) -> bool:
    assert isinstance(one, RawTensor) and isinstance(other, RawTensor)  # only names of files are tied
    if one.kind != other.kind or one.shape != other.shape:
        return False
    pieces = range(0, one.content.size, _COMPARED_BYTES)
    return all(
        np.array_equal(one.content[i : i + _COMPARED_BYTES], other.content[i : i + _COMPARED_BYTES]) for i in pieces
    )
