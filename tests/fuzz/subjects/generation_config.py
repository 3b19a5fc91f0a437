"""Damages generation_config.json, and end tokens in config.json: rows end at tokens of the vocabulary in any case.

A file about generation only must not keep a model from loading: it may be refused or ignored with a warning, but
never be used in part.
"""

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.damage import Allowed, Json, byte_damages, text_damages, tree_damages
from tests.fuzz.folders import check_loads, config_of, copy_of, golden_model
from tests.fuzz.verdict import Case, WrongResult

_BASE, _FILE = "llama", "generation_config.json"
_RIGHT = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "transformers_version": "5"}
_IN_CONFIG = 3
# Value of the end tokens -> the ids it means; None where it means none, and a warning is required.
_END_TOKENS: tuple[tuple[Json, tuple[int, ...] | None], ...] = (
    *((0, (0,)), (66, (66,)), ([7], (7,)), ([7, 7], (7,)), ([7, 9], (7, 9)), ([7, 67], (7,)), (67, None), (-1, None)),
    *((10**9, None), (2**63, None), (10**400, None), (2.0, None), (2.5, None), (True, None), ("2", None), ([], None)),
    *(([None], None), ([[2]], None), ({"a": 2}, None), ([2.5], None), (None, None), ([-1, 7], (7,))),
)


def cases(work: Path) -> Iterator[Case]:
    text = json.dumps(_RIGHT, indent=1).encode()
    for damage in (*tree_damages(_RIGHT), *text_damages(text), *byte_damages(text, range(180))):
        content = damage.content if isinstance(damage.content, bytes) else json.dumps(damage.content).encode()
        yield _case(work, damage.kind, content, None)
    for place in (_FILE, "config.json"):
        for index, (value, means) in enumerate(_END_TOKENS):
            yield _case(
                work, f"end tokens {index} in {place}", json.dumps({"eos_token_id": value}).encode(), means, place
            )


def _case(work: Path, kind: str, content: bytes, means: tuple[int, ...] | None, place: str = _FILE) -> Case:
    act = partial(_load, work, content, means, place)
    return Case(f"generation_config/{_BASE}/{kind}", act, ((place,),), given=content)


def _load(work: Path, content: bytes, means: tuple[int, ...] | None, place: str) -> None:
    folder = copy_of(_BASE, work)
    config: dict[str, Any] = config_of(_BASE) | {"eos_token_id": _IN_CONFIG}
    if place == _FILE:
        (folder / _FILE).write_bytes(content)
    else:
        (folder / _FILE).unlink(missing_ok=True)
        config |= json.loads(content)
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = check_loads(folder, golden_model(_BASE), Allowed.SAME)
    ends = model.end_token_ids
    if not all(type(token) is int and 0 <= token < model.config.vocab_size for token in ends):
        raise WrongResult(f"rows end at {str(ends)[:80]}, beyond the vocabulary of {model.config.vocab_size}")
    if means is not None and set(ends) != set(means):
        raise WrongResult(f"rows end at {ends}, the file says {means}")
    for warning in caught:
        warnings.warn(warning.message, stacklevel=1)  # judged with the case
