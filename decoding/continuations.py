"""Encodes prompts with their continuations: one row of token ids each, and where in it the continuation begins.

A text is encoded together with its prompt, as `encode_pair` of lm-evaluation-harness does it: white space at the end of
the prompt moves to the continuation, whose tokens are those of both texts after as many as the prompt has alone. Where
the two meet inside a token, that project runs the tokens of the prompt alone before them; here they are those of both
texts, so that a row is always what the tokenizer makes of a text.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decodax.core.arguments import is_integer, refusal, shown, text
from decodax.decoding.prompts import check_vocabulary, one_or_many, require_tokenizer
from decodax.models.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_KINDS = "a text or a list of token ids"
_FIRST_CHARACTERS = 64  # of a text, enough to see which tokens are put before it
_ANY_TEXT = "a"  # in place of one without tokens


class Continuation(NamedTuple):
    """The tokens of a prompt and its continuation.

    tokens: int64 [T], of both.
    first: the index of the continuation's first token, at least 1.
    """

    tokens: np.ndarray
    first: int


def encode_continuations(lm: "LanguageModel", prompts: Any, continuations: Any) -> list[Continuation]:
    """The tokens of each prompt with its continuation. The tokenizer's start token comes before a text, its end token
    after none; ids are taken as they are, except that no ids, like no text, are a prompt of the start token alone.

    lm: the model, with the tokenizer.
    prompts, continuations: one or many, as many of the one as of the other.
    Raises ValueError, with the index, for other types, different counts, ids outside the vocabulary, and where the
    continuation has no token of its own, or its first token none before it.
    """
    before = one_or_many("prompts", prompts, _KINDS)
    after = one_or_many("continuations", continuations, _KINDS)
    if len(before) != len(after):
        raise ValueError(
            f"continuations must be one for each prompt, got {len(after)} continuations and {len(before)} prompts"
        )
    if not before:
        raise ValueError("prompts must hold at least one prompt, got none")
    return [_encode(lm, index, *pair) for index, pair in enumerate(zip(before, after, strict=True))]


def encode_text(lm: "LanguageModel", name: str, given: str) -> list[int]:
    """The ids of a text with the tokenizer's start token and without its end token.

    name: of the text, for errors.
    Raises ValueError without a tokenizer, and for tokens that the model does not have.
    """
    tokenizer = require_tokenizer(lm)
    ids = _start_tokens(tokenizer, text(name, given)) + tokenizer.encode(given, add_special_tokens=False)
    check_vocabulary(lm, name, ids, is_text=True)
    return ids


def _encode(lm: "LanguageModel", index: int, prompt: Any, continuation: Any) -> Continuation:
    names = f"prompt {index}", f"continuation {index}"
    for name, given in zip(names, (prompt, continuation), strict=True):
        _check_kind(lm, name, given)
    if not continuation:
        raise ValueError(f"{names[1]} is empty: it must hold at least one token")
    is_text = isinstance(prompt, str) or not prompt
    start = _start_tokens(lm.tokenizer, prompt or "") if is_text and lm.tokenizer is not None else []
    before, after = _ids_of_both(lm, prompt, continuation)
    if not before and start and after[: len(start)] == start:
        after = after[len(start) :]  # the continuation begins with the start token itself
    if not after:
        raise ValueError(
            f"{names[1]}, {shown(continuation)}, has no token of its own after its prompt: give token ids, or "
            "move text from the prompt to it"
        )
    if not start + before:
        raise ValueError(
            f"{names[0]} is empty, and this model's tokenizer puts no start token before a text: the first token of "
            "a continuation needs one before it"
        )
    row = [*start, *before, *after]
    check_vocabulary(lm, f"{names[0]} with its continuation", row, is_text=True)
    return Continuation(np.asarray(row, np.int64), len(start) + len(before))


def _check_kind(lm: "LanguageModel", name: str, given: Any) -> None:
    if isinstance(given, str):
        require_tokenizer(lm)
        text(name, given)
    elif not (isinstance(given, list) and all(map(is_integer, given))):
        raise refusal(name, _KINDS, given)
    else:
        check_vocabulary(lm, name, given, is_text=False)


def _ids_of_both(lm: "LanguageModel", prompt: Any, continuation: Any) -> tuple[list[int], list[int]]:
    """The ids before and after the place where the continuation begins, without those that the tokenizer adds."""

    def ids(given: Any) -> list[int]:
        return require_tokenizer(lm).encode(given, add_special_tokens=False) if isinstance(given, str) else given

    if not (isinstance(prompt, str) and isinstance(continuation, str)):
        return ids(prompt), ids(continuation)
    count = len(ids(prompt.rstrip()))
    both = ids(prompt + continuation)
    return both[:count], both[count:]


def _start_tokens(tokenizer: Tokenizer, given: str) -> list[int]:
    """The ids that the tokenizer puts before a text; none where the text begins with the start token itself.

    Its rules may add tokens on both sides, and the library does not say which is where, so the text's own are found.
    """
    for beginning in (given.strip()[:_FIRST_CHARACTERS], _ANY_TEXT):
        own, all_ids = tokenizer.encode(beginning, add_special_tokens=False), tokenizer.encode(beginning)
        places = range(len(all_ids) - len(own) + 1 if own else 0)
        place = next((place for place in places if all_ids[place : place + len(own)] == own), None)
        if place is not None:
            return all_ids[:place]
    return []
