"""Finds the fields of `config.json` whose other value would make weights fit that do not.

One wrong size makes most weights of a model misshapen, and the list of them hides what is wrong. So each size that the
file gives is replaced by those that the weights suggest, and the config is read again: whatever a family derives from a
field is derived as always.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from decodax.models.config import ModelConfig
from decodax.models.hf_config import read_config
from decodax.models.layouts import Match
from decodax.models.model_files import printable

MatchOf = Callable[[ModelConfig], Match]

_DERIVED = {  # sizes that a config may leave out, and what they are then
    "num_key_value_heads": lambda raw: raw["num_attention_heads"],
    "head_dim": lambda raw: raw["hidden_size"] // raw["num_attention_heads"],
}
_NO_SIZE = re.compile(r".*_token_id|max_position_embeddings|max_window_layers|sliding_window")
_LAYER, _EXPERT = re.compile(r"(?<=\.layers\.)\d{1,9}(?=\.)"), re.compile(r"(?<=\.experts\.)\d{1,9}(?=\.)")
_MOST_FIELDS = 3  # that are wrong at once
_MOST_PAIRS = 12  # of sizes from which values are guessed
_MOST_SIZE, _MOST_EXPERTS = 2**24, 2**12  # what a config is read with here: reading one of a billion layers takes long


def explained(raw: Mapping[str, Any], stored: Iterable[str], match: Match, match_of: MatchOf) -> list[str]:
    """The lines of a match's report; a line for each field in the place of all tensors that its value explains.

    Where several fields explain all of them by themselves, each has a line.

    raw: the fields of `config.json`. stored: the names in the files. match_of: what the files hold of the weights of
        another config.
    """
    names, lines = list(stored), []
    for _ in range(_MOST_FIELDS):
        found = _better(raw, names, match, match_of)
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


def _better(raw: Mapping[str, Any], names: list[str], match: Match, match_of: MatchOf) -> list[tuple[str, int, Match]]:
    """The changes of one field with which less is wrong, and nothing else is."""
    found = []
    for name, size in _sizes(raw).items():
        for value in _values(name, size, names, match):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _, config = read_config({**raw, name: value})
                better = match_of(config)
            except ValueError:
                continue  # sizes that do not go together
            is_less = (
                better.misshapen.keys() <= match.misshapen.keys() and better.problems.keys() <= match.problems.keys()
            )
            if is_less and _num_problems(better) < _num_problems(match):
                found.append((name, value, better))
    return found


def _sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    """The fields that may say how large weights are, or how many."""
    sizes = {name: value for name, value in raw.items() if type(value) is int and not _NO_SIZE.fullmatch(name)}
    for name, derive in _DERIVED.items():
        if raw.get(name) is None and {"hidden_size", "num_attention_heads"} <= sizes.keys():
            sizes[name] = derive(raw)
    return {name: size for name, size in sizes.items() if size > 0}


def _values(name: str, size: int, names: list[str], match: Match) -> list[int]:
    """What a field may be if the files are right: the sizes found there, and the same multiple of its own value."""
    if "layers" in name:
        values = _count(_LAYER, names)
    else:
        values = _count(_EXPERT, names) if "expert" in name else set()
        pairs = [
            pair
            for found, wanted in match.misshapen.values()
            if len(found) == len(wanted)
            for pair in zip(found, wanted, strict=True)
            if pair[0] != pair[1]
        ]
        for found, wanted in list(dict.fromkeys(pairs))[:_MOST_PAIRS]:
            values |= {found, size * found // wanted}
    most = _MOST_EXPERTS if "expert" in name else _MOST_SIZE
    return sorted(value for value in values if 0 < value <= most and value != size)


def _count(index: re.Pattern[str], names: list[str]) -> set[int]:
    """How many layers, or experts, the names count."""
    highest = max((int(found[0]) for name in names if (found := index.search(name))), default=-1)
    return {highest + 1} if highest < len(names) else set()
