"""Reads the end-of-text token ids (`eos_token_id`) from the files of a model folder."""

import json
import warnings
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import UnreasonableFileError, parse_json_object
from decodax.models.checkpoints.model_source import ModelSource, source_of

_FIELD = "eos_token_id"


def read_end_token_ids(place: Path | ModelSource, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` (one or several) of `generation_config.json`, else of `config.json`.

    As in transformers, a generation_config.json that cannot be read counts as missing (with a warning). An id without
    a logit (beyond the vocabulary, or negative) can never be generated: it is left out, with a warning.
    """
    source = source_of(place)
    for name in ("generation_config.json", "config.json"):
        content, path = source.read(name), source.where(name)
        if content is None:
            continue
        try:
            ids = _ids_in(content, path)
        except ValueError as error:
            if name == "config.json" or isinstance(error, UnreasonableFileError):
                raise
            warnings.warn(f"{error}; the file is not used, but {_FIELD} of config.json", stacklevel=4)
            continue
        if ids:
            return _usable(ids, path, vocab_size)
    return ()


def _ids_in(content: bytes, path: str) -> tuple[int, ...]:
    value: Any = parse_json_object(content, path).get(_FIELD)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
        found = printable(json.dumps(value))  # with the quotation marks of a text
        raise ValueError(f"{_FIELD} in {printable(path)} must be a token id or a list of them, got {found}")
    return tuple(dict.fromkeys(values))


def _usable(ids: tuple[int, ...], path: str, vocab_size: int) -> tuple[int, ...]:
    usable = tuple(token for token in ids if 0 <= token < vocab_size)
    if usable != ids:
        others = printable(", ".join(str(token) for token in ids if token not in usable))
        left = f"ends at {', '.join(map(str, usable))}" if usable else "has no end token, and goes on to its limit"
        warnings.warn(
            f"{_FIELD} in {printable(path)} must be in 0..{vocab_size - 1} (the model's vocabulary), got {others}, "
            f"which the model cannot write: a text {left}",
            stacklevel=5,
        )
    return usable
