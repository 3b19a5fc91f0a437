"""Encodes prompts as token ids: one prompt or many, each a text, a conversation or token ids."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import in_order, is_integer, plain, refusal, shown, text
from decodax.core.printable import printable
from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_KINDS = "a text, a list of token ids or a list of messages"


def encode_prompts(
    lm: "LanguageModel", prompts: Any, chat_options: Mapping[str, Any] | None = None
) -> list[np.ndarray]:
    """Int64 token ids of each prompt: text, messages or ids, in lists, tuples, iterators or arrays.

    What the first entry of a list is tells what the list is: an integer makes it the ids of one prompt, a mapping the
    messages of one conversation, and anything else many prompts. So [T] is one prompt, [B, T] are B, and a list of
    lists of messages has a conversation in each row.

    lm: the model, with the tokenizer.
    prompts: what the user passed.
    chat_options: those of `Tokenizer.encode_chat` for prompts that are messages, `chat_template_kwargs` as one mapping.
    Raises ValueError, with the prompt's index, for other types, empty prompts, a prompt that mixes messages with other
    things, or ids outside the vocabulary; and for options of conversations where there is none.
    """
    entries = one_or_many("prompts", prompts, _KINDS)
    options = dict(chat_options or {})
    if options and not any(_is_conversation(entry) for entry in entries):
        raise ValueError(
            f"{', '.join(options)} is for prompts that are messages, like "
            '[{"role": "user", "content": "..."}], and these are texts or token ids'
        )
    rows = [encode_prompt(lm, prompt, f"prompt {index}", options) for index, prompt in enumerate(entries)]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    return rows


def one_or_many(name: str, prompts: Any, kinds: str) -> list[Any]:
    """The prompts, each of them a text or a list; all else is left as it is, to be refused by its index.

    name: of the argument.
    prompts: what the user passed.
    kinds: what one of them can be, for the error.
    """
    found = plain(prompts)
    if isinstance(found, str):
        return [found]
    entries = in_order(found)
    if entries is None:
        hint = "; a message alone is no prompt, a list of messages is" if isinstance(found, Mapping) else ""
        raise refusal(name, f"{kinds}, or a list of such {name}", prompts, hint)
    if entries and (is_integer(entries[0]) or isinstance(entries[0], Mapping)):
        return [entries]
    # An iterator ends at its first use.
    lists = (None if isinstance(entry, str) else in_order(entry) for entry in entries)
    return [entry if items is None else items for entry, items in zip(entries, lists, strict=True)]


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and any(isinstance(entry, Mapping) for entry in prompt)


def encode_prompt(lm: "LanguageModel", prompt: Any, name: str, chat_options: dict[str, Any]) -> np.ndarray:
    """Int64 token ids of one prompt, as `encode_prompts`; a text, or a list; `name` is its own, for errors."""
    is_text = isinstance(prompt, str) or _is_conversation(prompt)
    if isinstance(prompt, str):
        ids = require_tokenizer(lm).encode(text(name, prompt))
    elif _is_conversation(prompt):
        ids = _encode_conversation(lm, prompt, name, chat_options)
    elif isinstance(prompt, list) and all(map(is_integer, prompt)):
        ids = prompt
    else:
        raise refusal(name, _KINDS, prompt)
    if not ids:
        raise ValueError(f"{name} is empty: it must hold at least one token")
    check_vocabulary(lm, name, ids, is_text=is_text)
    return np.asarray(ids, np.int64)


def _encode_conversation(
    lm: "LanguageModel", messages: list[Any], name: str, chat_options: dict[str, Any]
) -> list[int]:
    if not all(isinstance(message, Mapping) for message in messages):
        other = next(message for message in messages if not isinstance(message, Mapping))
        raise ValueError(f"{name} mixes messages with {shown(other)}: a conversation is a list of messages alone")
    options = {name: value for name, value in chat_options.items() if name != "chat_template_kwargs"}
    variables = chat_options.get("chat_template_kwargs", {})
    is_continued = bool(options.get("continue_final_message"))
    tokenizer = require_tokenizer(lm)
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=not is_continued, **options, **variables)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def require_tokenizer(lm: "LanguageModel") -> Tokenizer:
    """The model's tokenizer; ValueError where it has none."""
    if lm.tokenizer is None:
        raise ValueError(no_tokenizer_message(lm.path, "pass token ids instead of text"))
    return lm.tokenizer


def check_vocabulary(lm: "LanguageModel", name: str, ids: Sequence[int], *, is_text: bool) -> None:
    """Raises ValueError for a token id outside the model's vocabulary.

    name: of what holds the ids.
    is_text: whether the tokenizer gave them.
    """
    outside = next((token for token in ids if not 0 <= token < lm.config.vocab_size), None)
    if outside is None:
        return
    last = lm.config.vocab_size - 1
    if not is_text or lm.tokenizer is None:
        raise ValueError(f"{name}: token ids must be in 0..{last} (the vocabulary), got {shown(outside)}")
    raise ValueError(
        f"{name} holds {shown(lm.tokenizer.backend.id_to_token(outside))}, which is token {outside} in the tokenizer "
        f"of {printable(lm.path)}, but the model's vocabulary ends at {last}: leave it out of the text"
    )


def check_context(lm: "LanguageModel", name: str, ids: Sequence[int] | np.ndarray) -> None:
    """Raises ValueError for a prompt that leaves no room for a new token."""
    context = lm.config.max_position_embeddings
    if len(ids) >= context:
        raise ValueError(
            f"{name} has {len(ids)} tokens, and the model's context of {context} leaves room for at most {context - 1} "
            "before a new one: shorten it"
        )
