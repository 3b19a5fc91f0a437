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
from decodax.decoding.prompts import encode_prompts

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

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
                errors[index] = str(error).replace("prompt 0", "the prompt", 1)
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
    (ids,) = _ids(lm, entry, own, chat=chat, system=system)
    context = lm.config.max_position_embeddings
    if len(ids) >= context:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, and the model's context of {context:,} leaves room for at most "
            f"{context - 1:,} before a new one: shorten it"
        )
    return PromptLine(index, ids, given)


def _option(name: str, value: Any) -> Any:
    """A value that stands for one prompt; token ids are texts in JSON's objects."""
    if isinstance(value, list):
        raise ValueError(f"{printable(name)} must be one value, got {shown(value)}")
    if name == "logit_bias" and isinstance(value, dict):
        return {int(token) if _TOKEN_ID.fullmatch(token) else token: number for token, number in value.items()}
    return value


def _ids(
    lm: "LanguageModel", entry: dict[str, Any], options: GenerateOptions, *, chat: bool, system: str | None
) -> list[np.ndarray]:
    if entry.get("tokens") is not None:
        if not isinstance(entry["tokens"], list):
            raise ValueError(f"tokens must be a list of token ids, got {shown(entry['tokens'])}")
        return encode_prompts(lm, [entry["tokens"]])
    if entry.get("messages") is not None or chat:
        messages = entry.get("messages")
        if messages is None:
            before = [] if system is None else [{"role": "system", "content": system}]
            messages = [*before, {"role": "user", "content": entry["prompt"]}]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages must be a list of messages, got {shown(messages)}")
        return encode_prompts(lm, [messages], options.chat_options)
    if not isinstance(entry["prompt"], str):
        raise ValueError(f"prompt must be a text, got {shown(entry['prompt'])}")
    return encode_prompts(lm, [entry["prompt"]])
