"""Encodes prompts as token ids: one prompt or many, each a text or token ids."""

from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import in_order, is_integer, plain, refusal, shown, text
from decodax.core.printable import printable
from decodax.models.tokenizers.tokenizer import no_tokenizer_message

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


def encode_prompts(lm: "LanguageModel", prompts: Any) -> list[np.ndarray]:
    """Int64 token ids of each prompt: text or ids, in lists, tuples, iterators or arrays ([T] is one, [B, T] are B).

    Raises ValueError, with the prompt's index, for other types, empty prompts, or ids outside the vocabulary.
    """
    rows = [_encode(lm, prompt, f"prompt {index}") for index, prompt in enumerate(_one_or_many(prompts))]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    return rows


def _one_or_many(prompts: Any) -> list[Any]:
    found = plain(prompts)
    if isinstance(found, str):
        return [found]
    entries = in_order(found)
    if entries is None:
        raise refusal("prompts", "a text, a list of token ids, or a list of such prompts", prompts)
    return [entries] if entries and is_integer(entries[0]) else entries


def _encode(lm: "LanguageModel", prompt: Any, name: str) -> np.ndarray:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise ValueError(no_tokenizer_message(lm.path, "pass token ids instead of text"))
        ids = lm.tokenizer.encode(text(name, prompt))
    else:
        ids = in_order(prompt)
        if ids is None or not all(map(is_integer, ids)):
            raise refusal(name, "a text or a list of token ids", prompt)
    if not ids:
        raise ValueError(f"{name} is empty: it must hold at least one token")
    outside = next((token for token in ids if not 0 <= token < lm.config.vocab_size), None)
    if outside is not None:
        raise ValueError(_outside(lm, name, outside, is_text=isinstance(prompt, str)))
    return np.asarray(ids, np.int64)


def _outside(lm: "LanguageModel", name: str, token: int, *, is_text: bool) -> str:
    last = lm.config.vocab_size - 1
    if not is_text or lm.tokenizer is None:
        return f"{name}: token ids must be in 0..{last} (the vocabulary), got {shown(token)}"
    return (
        f"{name} holds {shown(lm.tokenizer.backend.id_to_token(token))}, which is token {token} in tokenizer.json of "
        f"{printable(lm.path)}, but the model's vocabulary ends at {last}: leave it out of the text"
    )
