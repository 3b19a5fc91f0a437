"""Finds which of the layouts that a model may be stored in a checkpoint has, and reports all that does not fit."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from decodax.models.families._contract import ParameterPath
from decodax.models.model_files import printable
from decodax.models.sources import Layout, Layouts, Shape, Source
from decodax.models.stored_files import Entry, RawTensor, same_numbers
from decodax.models.stored_formats import Quantization, StoredTensor, interpret, is_stored_as, scales_of
from decodax.models.tensor_names import TensorNames, find_names

Filled = dict[ParameterPath, list[tuple[Source, StoredTensor]]]  # what each parameter is filled from

# Stored beside the weights by some programs, and derived from the config: nothing is lost without them.
REDUNDANT_SUFFIXES = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "self_attn.masked_bias"),
    # of MiniMax's lightning attention
    *("self_attn.slope_rate", "self_attn.query_decay", "self_attn.key_decay", "self_attn.diagonal_decay"),
)


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


@dataclass(frozen=True)
class Match:
    """What the files hold of what they should.

    names: the prefixes of the files. nearest: of each parameter's layouts, the one of which most is there.
    misshapen: the shape of a tensor and the one expected, by name. problems: a line for each tensor that is missing,
    surplus or unreadable.
    """

    names: TensorNames
    nearest: Mapping[ParameterPath, Layout]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)  # keeps the order, and names once what two parameters miss

    def report(self) -> list[str]:
        """A line for each tensor that does not fit."""
        lines = [
            f"misshapen: {printable(name)} {list(shape)}, expected {list(wanted)}"
            for name, (shape, wanted) in self.misshapen.items()
        ]
        return [*lines, *self.problems]

    def filled(self, stored: Mapping[str, Entry]) -> Filled:
        """The stored tensors that fill each parameter, in the order of the files."""
        position = {name: index for index, name in enumerate(stored)}
        nearest = self.nearest
        in_order = sorted(nearest, key=lambda path: min(position[source.name] for source in nearest[path]))
        return {path: [(source, self.tensors[source.name]) for source in nearest[path]] for path in in_order}


def match_sources(stored: Mapping[str, Entry], expected: Expected) -> Match:
    """Compares the stored tensors with what they should be."""
    names = find_names(stored, tensor_names(expected.layouts))
    layouts = {path: _in_file(several, names) for path, several in expected.layouts.items()}
    nearest = {path: max(several, key=lambda layout: _share(layout, stored)) for path, several in layouts.items()}
    match = Match(names, nearest)
    for path, layout in nearest.items():
        _check_places(path, layout, expected.shapes[path])
        match.problems.update(dict.fromkeys(_missing(layout, layouts[path], expected.shapes[path], stored)))
    _read_forms(stored, expected, match)
    match.problems.update(dict.fromkeys(_surplus(stored, layouts, expected, match)))
    method = None if expected.quantization is None else expected.quantization.method
    if method is not None and not is_stored_as(method, stored):
        match.problems[
            f"quantization_config in config.json says {method}, but no tensor is stored so: remove it from there if "
            "the weights are plain"
        ] = None
    return match


def tensor_names(layouts: Mapping[ParameterPath, Layouts]) -> set[str]:
    """The names of all tensors that may fill these parameters."""
    return {source.name for several in layouts.values() for layout in several for source in layout}


def _in_file(layouts: Layouts, names: TensorNames) -> Layouts:
    """The same layouts under the names that the files have."""
    if names == TensorNames():
        return layouts
    return tuple(tuple(replace(source, name=names.in_file(source.name)) for source in layout) for layout in layouts)


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
    absent = [source for source in layout if source.name not in stored]
    lines = [f"missing: {source.name} {list(source.stored_shape(shape))}" for source in absent]
    if not any(source.name in stored for several in layouts for source in several):
        others = [several[0] for several in layouts if several is not layout]
        lines[0] += "".join(f", or {source.name} {list(source.stored_shape(shape))}" for source in others)
    return lines


def _read_forms(stored: Mapping[str, Entry], expected: Expected, match: Match) -> None:
    """Adds every tensor that is used, in the form it is stored in, and those of a wrong shape or form."""
    for path, layout in match.nearest.items():
        for source in layout:
            if source.name not in stored:
                continue
            try:
                if source.name not in match.tensors:
                    match.tensors[source.name] = interpret(source.name, stored, expected.quantization)
            except ValueError as error:
                match.problems[str(error)] = None
                continue
            shape, wanted = match.tensors[source.name].shape, source.stored_shape(expected.shapes[path])
            if shape != wanted:
                match.misshapen[source.name] = (shape, wanted)


def _surplus(
    stored: Mapping[str, Entry], layouts: Mapping[ParameterPath, Layouts], expected: Expected, match: Match
) -> list[str]:
    """A line for each stored tensor that fills nothing, or is a second copy that differs from the first."""
    used = {source.name for layout in match.nearest.values() for source in layout if source.name in stored}
    used |= {scales for name in used if (scales := scales_of(name, stored)) is not None}
    known = tensor_names(layouts)
    tied_head = None if expected.tied_head is None else [match.names.in_file(name) for name in expected.tied_head]
    lines = []
    for name, tensor in stored.items():
        if name in used or name.endswith(REDUNDANT_SUFFIXES):
            continue
        if tied_head is not None and name == tied_head[0]:
            if not _equal(tensor, stored[tied_head[1]]):
                lines.append(
                    f"{name} differs from the embedding although the config ties them: "
                    "set tie_word_embeddings to false in config.json to use it, or remove it from the file"
                )
        elif name in known:
            lines.append(f"surplus: {name} {list(tensor.shape)}, of another layout than the rest: keep one of the two")
        elif expected.elsewhere is None or not re.fullmatch(expected.elsewhere, match.names.expected(name)):
            lines.append(f"surplus: {printable(name)} {list(tensor.shape)}")
    return lines


def _equal(one: Entry, other: Entry) -> bool:
    assert isinstance(one, RawTensor) and isinstance(other, RawTensor)  # only names of files are tied
    return same_numbers(one, other)
