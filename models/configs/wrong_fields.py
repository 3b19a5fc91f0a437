"""Finds wrong fields of `config.json`: those that, with another value, make mismatched weights fit.

One wrong size makes most weights of a model misshapen, and the list of them hides the cause. So each size that the file
gives or leaves out is replaced by those that the weights suggest, and the config is read again: whatever a family
derives from a field is derived as always.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.name_map_selection import Expected, Match, match_tensors
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.config import ModelConfig
from decodax.models.configs.field_kinds import quoted
from decodax.models.configs.hf_config import read_config
from decodax.models.families import FAMILIES

ExpectedOf = Callable[[ModelConfig], Expected]

_DERIVED = {  # sizes that a config may leave out, and their values then
    "num_key_value_heads": lambda raw: raw["num_attention_heads"],
    "head_dim": lambda raw: raw["hidden_size"] // raw["num_attention_heads"],
}
_NO_SIZE = re.compile(r".*_token_id|max_position_embeddings|max_window_layers|sliding_window")
_LAYER = re.compile(r"(?:(?<=\blayers\.)|(?<=\bblocks\.)|(?<=\bh\.))\d{1,9}(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d{1,9}(?=\.)")
_LAYER_OF_EXPERTS = re.compile(r"\.layers\.(\d{1,9})\..*experts")
_MOST_FIELDS = 3  # that are wrong at once
_MOST_TENSORS = 20_000  # in files that are matched again for every candidate value
_MOST_SHARED = 8  # shared experts, of which published models have up to two
_MOST_PAIRS = 12  # of sizes from which candidate values are made
_MOST_SIZE, _MOST_EXPERTS = 2**24, 2**12  # of candidate values: reading a config of a billion layers takes long


def explained(raw: Mapping[str, Any], stored: Mapping[str, Entry], match: Match, expected_of: ExpectedOf) -> list[str]:
    """The lines of a match's report, with one line per wrong field in place of all tensors that it explains.

    If several fields each explain all of them, each has a line. A field that decides which tensors exist (a flag, null,
    a list of layers) is only named beside them, since the tensors may as well be missing.

    raw: the fields of `config.json`.
    stored: the tensors of the files, by name.
    match: of the stored tensors with those expected by these fields.
    expected_of: the expected tensors for another config.
    """
    lines = []
    if len(stored) > _MOST_TENSORS or str(raw.get("model_type")) not in FAMILIES:  # a program's own config, say
        return match.report()
    aliases = FAMILIES[raw["model_type"]].aliases
    written = {aliases[name]: name for name in raw if name in aliases}
    raw = {aliases.get(name, name): value for name, value in raw.items()}
    for _ in range(_MOST_FIELDS):
        found = _better(raw, stored, match, expected_of)
        if not found:
            break
        fewest = min(_num_problems(better) for *_, better in found)
        best = [change for change in found if _num_problems(change[2]) == fewest]
        lines += [_line(raw, name, value, written) for name, value, _ in (best if fewest == 0 else best[:1])]
        name, value, match = best[0]
        raw = {**raw, name: value}
    if match.problems and not lines:
        lines = _switches(raw, stored, expected_of, written)
    return [*lines, *match.report()]


def _switches(
    raw: Mapping[str, Any], stored: Mapping[str, Entry], expected_of: ExpectedOf, written: Mapping[str, str]
) -> list[str]:
    """A line for each field that decides which tensors exist, and whose other value alone would make the files fit."""
    lines = []
    for name, value in _given(raw).items():
        for other in _other_switches(raw, name, value, stored):
            try:
                match = match_tensors(stored, expected_of(_config({**raw, name: other})))
            except ValueError:
                continue
            if not _num_problems(match):
                lines.append(_line(raw, name, other, written))
                break
    return lines


def _other_switches(raw: Mapping[str, Any], name: str, value: Any, stored: Mapping[str, Entry]) -> list[Any]:
    """The other values that such a field may have; empty for all other fields."""
    family = FAMILIES[raw["model_type"]]
    if name not in family.defaults or _NO_SIZE.fullmatch(name):
        return []
    if isinstance(value, bool):
        return [not value]
    with_experts = {int(found[1]) for one in stored if (found := _LAYER_OF_EXPERTS.search(one))}
    num_layers = _given(raw)["num_hidden_layers"]
    if name == "mlp_only_layers":
        return [sorted(set(range(num_layers)) - with_experts)]
    if name == "decoder_sparse_step":
        return [min(with_experts, default=num_layers) + 1]
    if name == "first_k_dense_replace":
        return [min(with_experts, default=num_layers)]
    if name in family.nullable:
        sizes = {entry.shape[0] for entry in stored.values() if len(entry.shape) == 1}
        return sorted(sizes)[:_MOST_PAIRS] if value is None else [None]
    return list(range(1, _MOST_SHARED + 1)) if value == 0 else []


def _line(raw: Mapping[str, Any], name: str, value: Any, written: Mapping[str, str]) -> str:
    """The line for a field with another value; `written` has the names of fields in the file that differ."""
    said = f"is {quoted(raw[name])}" if name in raw else "is missing"
    return f"wrong field: {printable(written.get(name, name))} {said} in config.json, the files have {quoted(value)}"


def _num_problems(match: Match) -> int:
    return len(match.misshapen) + len(match.problems)


def _better(
    raw: Mapping[str, Any], stored: Mapping[str, Entry], match: Match, expected_of: ExpectedOf
) -> list[tuple[str, int, Match]]:
    """The changes of one field that leave fewer problems and add none."""
    misshapen = [
        path
        for path, name_map in match.nearest.items()
        if any(tensor_slice.name in match.misshapen for tensor_slice in name_map)
    ]
    shapes, found = expected_of(_config(raw)).shapes, []
    for name, size in _sizes(raw).items():
        for value in _values(raw, name, size, list(stored), match):
            try:
                expected = expected_of(_config({**raw, name: value}))
                if misshapen and all(expected.shapes.get(path) == shapes[path] for path in misshapen):
                    continue
                better = match_tensors(stored, expected)
            except ValueError:
                continue  # sizes that do not go together
            if _num_problems(better) < _num_problems(match) and _is_subset(better, match):
                found.append((name, value, better))
    return found


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when the file itself was read
        return read_config(raw)[1]


def _is_subset(one: Match, other: Match) -> bool:
    return one.misshapen.keys() <= other.misshapen.keys() and one.problems.keys() <= other.problems.keys()


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the file gives, and the defaults of those that it leaves out."""
    family = FAMILIES[raw["model_type"]]
    named = {family.aliases.get(name, name) for name in raw}
    return {**raw, **{name: value for name, value in family.defaults.items() if name not in named}}


def _sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    """The fields that may be sizes or numbers of weights."""
    sizes = {name: value for name, value in _given(raw).items() if type(value) is int and not _NO_SIZE.fullmatch(name)}
    for name, derive in _DERIVED.items():
        if raw.get(name) is None and {"hidden_size", "num_attention_heads"} <= sizes.keys():
            sizes.setdefault(name, derive(sizes))
    return {name: size for name, size in sizes.items() if size >= 0}


def _values(raw: Mapping[str, Any], name: str, size: int, names: list[str], match: Match) -> list[int]:
    """Candidate values of a field if the files are right: a size found there, or its own by the same factor or offset.

    raw: the fields of `config.json`.
    name, size: of the field, and its value.
    names: of the stored tensors.
    match: of the stored tensors with the expected ones.
    """
    if "layers" in name:
        values = _count(_LAYER, names)
    else:
        values = _count(_EXPERT, names) if "expert" in name else set()
        divisors = _numbers_of_heads(raw) if name.endswith("head_dim") else {1}
        pairs = [
            pair
            for found, expected in match.misshapen.values()
            if len(found) == len(expected)
            for pair in zip(found, expected, strict=True)
            if pair[0] != pair[1]
        ]
        for found, expected in list(dict.fromkeys(pairs))[:_MOST_PAIRS]:
            values |= {found, size * found // max(expected, 1)}
            values |= {size + (found - expected) // divisor for divisor in divisors}
    most = _MOST_EXPERTS if "expert" in name else _MOST_SIZE
    return sorted(value for value in values if 0 < value <= most and value != size)


def _numbers_of_heads(raw: Mapping[str, Any]) -> set[int]:
    """The numbers of heads that may share a weight."""
    return {1, *(size for name, size in _sizes(raw).items() if name.endswith("_heads") and size > 0)}


def _count(index: re.Pattern[str], names: list[str]) -> set[int]:
    """The number of layers, or experts, in the names."""
    highest = max((int(found[0]) for name in names if (found := index.search(name))), default=-1)
    return {highest + 1} if highest < len(names) else set()
