"""Finds the fields of `config.json` whose other value would make weights fit that do not.

One wrong size makes most weights of a model misshapen, and the list of them hides what is wrong. So each size that the
file gives is replaced by those that the weights suggest, and the config is read again: whatever a family derives from a
field is derived as always.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from decodax.models.config import ModelConfig
from decodax.models.families import FAMILIES
from decodax.models.hf_config import read_config
from decodax.models.layouts import Expected, Match, match_sources
from decodax.models.model_files import printable
from decodax.models.stored_files import Entry

ExpectedOf = Callable[[ModelConfig], Expected]

_DERIVED = {  # sizes that a config may leave out, and what they are then
    "num_key_value_heads": lambda raw: raw["num_attention_heads"],
    "head_dim": lambda raw: raw["hidden_size"] // raw["num_attention_heads"],
}
_NO_SIZE = re.compile(r".*_token_id|max_position_embeddings|max_window_layers|sliding_window")
_LAYER, _EXPERT = re.compile(r"(?<=\.layers\.)\d{1,9}(?=\.)"), re.compile(r"(?<=\.experts\.)\d{1,9}(?=\.)")
_MOST_FIELDS = 3  # that are wrong at once
_MOST_TENSORS = 20_000  # in files that are looked at once more for every guess
_MOST_PAIRS = 12  # of sizes from which values are guessed
_MOST_SIZE, _MOST_EXPERTS = 2**24, 2**12  # what a config is read with here: reading one of a billion layers takes long


def explained(raw: Mapping[str, Any], stored: Mapping[str, Entry], match: Match, expected_of: ExpectedOf) -> list[str]:
    """The lines of a match's report; a line for each field in the place of all tensors that its value explains.

    Where several fields explain all of them by themselves, each has a line.

    raw: the fields of `config.json`. match: of the stored tensors with what they should be by these fields.
    expected_of: what they should be by another config.
    """
    lines = []
    for _ in range(_MOST_FIELDS if len(stored) <= _MOST_TENSORS else 0):
        found = _better(raw, stored, match, expected_of)
        if not found:
            break
        fewest = min(_num_problems(better) for *_, better in found)
        best = [change for change in found if _num_problems(change[2]) == fewest]
        lines += [_line(raw, name, value) for name, value, _ in (best if fewest == 0 else best[:1])]
        name, value, match = best[0]
        raw = {**raw, name: value}
    return [*lines, *match.report()]


def _line(raw: Mapping[str, Any], name: str, value: int) -> str:
    said = "is missing" if raw.get(name) is None else f"is {raw[name]}"
    return f"wrong field: {printable(name)} {said} in config.json, the files have {value}"


def _num_problems(match: Match) -> int:
    return len(match.misshapen) + len(match.problems)


def _better(
    raw: Mapping[str, Any], stored: Mapping[str, Entry], match: Match, expected_of: ExpectedOf
) -> list[tuple[str, int, Match]]:
    """The changes of one field with which less is wrong, and nothing else is."""
    misshapen = [
        path for path, layout in match.nearest.items() if any(source.name in match.misshapen for source in layout)
    ]
    shapes, found = expected_of(_config(raw)).shapes, []
    for name, size in _sizes(raw).items():
        for value in _values(name, size, list(stored), match):
            try:
                expected = expected_of(_config({**raw, name: value}))
                if misshapen and all(expected.shapes.get(path) == shapes[path] for path in misshapen):
                    continue
                better = match_sources(stored, expected)
            except ValueError:
                continue  # sizes that do not go together
            if _num_problems(better) < _num_problems(match) and _is_subset(better, match):
                found.append((name, value, better))
    return found


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were heard when the file itself was read
        return read_config(raw)[1]


def _is_subset(one: Match, other: Match) -> bool:
    return one.misshapen.keys() <= other.misshapen.keys() and one.problems.keys() <= other.problems.keys()


def _sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    """The fields that may say how large weights are, or how many, with what those left out are by default."""
    family = FAMILIES[raw["model_type"]]
    named = {family.aliases.get(name, name) for name in raw}
    given = {**raw, **{name: value for name, value in family.defaults.items() if name not in named}}
    sizes = {name: value for name, value in given.items() if type(value) is int and not _NO_SIZE.fullmatch(name)}
    for name, derive in _DERIVED.items():
        if raw.get(name) is None and {"hidden_size", "num_attention_heads"} <= sizes.keys():
            sizes[name] = derive(raw)
    return {name: size for name, size in sizes.items() if size > 0}


def _values(name: str, size: int, names: list[str], match: Match) -> list[int]:
    """What a field may be if the files are right: a size found there, or its own with the same factor or sum."""
    if "layers" in name:
        values = _count(_LAYER, names)
    else:
        values = _count(_EXPERT, names) if "expert" in name else set()
        pairs = [
            pair
            for found, wanted in match.misshapen.values()
            if len(found) == len(wanted)
            for pair in zip(found, wanted, strict=True)
            if pair[0] != pair[1] > 0
        ]
        for found, wanted in list(dict.fromkeys(pairs))[:_MOST_PAIRS]:
            values |= {found, size * found // wanted, size + found - wanted}
    most = _MOST_EXPERTS if "expert" in name else _MOST_SIZE
    return sorted(value for value in values if 0 < value <= most and value != size)


def _count(index: re.Pattern[str], names: list[str]) -> set[int]:
    """How many layers, or experts, the names count."""
    highest = max((int(found[0]) for name in names if (found := index.search(name))), default=-1)
    return {highest + 1} if highest < len(names) else set()
