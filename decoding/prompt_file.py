"""Reads a file of prompts in JSON lines: a text, a conversation or token ids on each, with options of its own.

{"prompt": "def fibonacci(n):", "max_new_tokens": 64}
{"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.8, "seed": 7}
{"tokens": [17, 4, 230]}
"""

import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import shown
from decodax.core.printable import printable
from decodax.decoding.logits_processors import METHODS as PROCESSORS
from decodax.decoding.options import GenerateOptions
from decodax.decoding.prompts import check_context, encode_prompt

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_NAME = "the prompt"  # in errors, which stand beside the line's number
_PROMPTS = ("prompt", "messages", "tokens")
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
_OF_LINES = ("max_new_tokens", "seed")  # beside the options of logits processors


@dataclass(frozen=True)
class PromptLine:
    """A line that can be answered.

    index: of the line, from 0.
    ids: of the prompt.
    options: those that the line gives.
    """

    index: int
    ids: np.ndarray
    options: Mapping[str, Any]


def read_prompt_file(
    lm: "LanguageModel", path: Path, options: GenerateOptions, *, chat: bool = False, system: str | None = None
) -> tuple[list[PromptLine], dict[int, str]]:
    """The lines that can be answered, and what is wrong with the others, by their index. Empty lines do not count.

    options: for all lines that do not give their own.
    chat: whether a text is a question, which the model's chat template writes, after the turn `system` if it is given.
    Raises ValueError for a file without any prompt.
    """
    lines, errors = [], {}
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)} is no file: prompts in JSON lines are expected")
    with path.open("rb") as file:
        for index, content in enumerate(line for line in file if line.strip()):
            try:
                lines.append(_read_line(lm, index, content, options, chat=chat, system=system))
            except ValueError as error:
                errors[index] = str(error)
    if not lines and not errors:
        raise ValueError(f"{printable(path)} has no prompts: a JSON object on each line is expected")
    return lines, errors


def _read_line(
    lm: "LanguageModel", index: int, content: bytes, options: GenerateOptions, *, chat: bool, system: str | None
) -> PromptLine:
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {printable(error)}") from error
    if not isinstance(entry, dict) or sum(entry.get(name) is not None for name in _PROMPTS) != 1:
        raise ValueError(f"an object with one of {', '.join(_PROMPTS)} is expected, got {shown(entry)}")
    named = {name: value for name, value in entry.items() if name not in _PROMPTS and value is not None}
    known = (*PROCESSORS, *_OF_LINES)
    if for_all := sorted(named.keys() & {field.name for field in dataclasses.fields(options)} - set(known)):
        raise ValueError(f"{for_all[0]} is for all lines: give it to the command, not to a line")
    if unknown := sorted(named.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"a line has no option {printable(repr(unknown[0]))}: {hint}")
    given = {name: _option(name, value) for name, value in named.items()}
    own = dataclasses.replace(options, **given)
    if given:
        with warnings.catch_warnings(action="ignore"):
            own.sampling(1, lm.config.vocab_size, own.end_tokens(lm.end_token_ids, lm.config.vocab_size))
    prompt, is_conversation = _prompt(entry, chat=chat, system=system)
    ids = encode_prompt(lm, prompt, _NAME, own.chat_options if is_conversation else {})
    check_context(lm, _NAME, ids)
    return PromptLine(index, ids, given)


def _option(name: str, value: Any) -> Any:
    """A value that stands for one prompt; token ids are texts in JSON's objects."""
    if isinstance(value, list):
        raise ValueError(f"{printable(name)} must be one value, got {shown(value)}")
    if name == "logit_bias" and isinstance(value, dict):
        return {int(token) if _TOKEN_ID.fullmatch(token) else token: number for token, number in value.items()}
    return value


def _prompt(entry: dict[str, Any], *, chat: bool, system: str | None) -> tuple[Any, bool]:
    """The prompt of a line, and whether it is a conversation."""
    for name, kind, expected in (
        ("tokens", list, "a list of token ids"),
        ("messages", list, "a list of messages"),
        ("prompt", str, "a text"),
    ):
        if entry.get(name) is not None and (not isinstance(entry[name], kind) or entry[name] == []):
            raise ValueError(f"{name} must be {expected}, got {shown(entry[name])}")
    if entry.get("prompt") is None or not chat:
        found = next(entry[name] for name in _PROMPTS if entry.get(name) is not None)
        return found, entry.get("messages") is not None
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": entry["prompt"]}], True
