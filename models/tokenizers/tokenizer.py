"""Converts text to token ids and back, with the `tokenizers` library and the files of a Hugging Face folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from decodax.core.printable import printable
from decodax.models.tokenizers.added_tokens import read_settings
from decodax.models.tokenizers.byte_tokens import between_characters, joins_byte_tokens
from decodax.models.tokenizers.chat_template import render_chat, select_template
from decodax.models.tokenizers.chat_template_files import read_chat_templates
from decodax.models.tokenizers.gguf_vocabulary import build_tokenizer, gguf_chat_templates, named_tokens
from decodax.models.tokenizers.stream_decoder import StreamDecoder
from decodax.models.tokenizers.vocabulary import library_errors
from decodax.models.tokenizers.vocabulary_files import read_vocabulary


class Tokenizer:
    """The tokenizer of a model, with the start and end tokens that the model expects, and its chat templates."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        source: str = "the tokenizer",
        chat_templates: Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a tokenizer of the library.

        backend: of the `tokenizers` library.
        prefix, suffix: ids that `encode` puts around every text, besides those of the post-processor.
        source: its name in error messages.
        chat_templates: Jinja templates by name; the usual one is called "default".
        named_tokens: the texts of special tokens by role ("bos_token"), which templates may ask for.
        """
        self.backend = backend
        self.chat_templates = dict(chat_templates or {})
        self.named_tokens = dict(named_tokens or {})
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._source = source
        # Since 0.23 the library has normalized ones under another name ("▁</s>"), and does not skip them.
        self.special_tokens = {
            token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._decoder = backend.decoder
        self._has_byte_tokens = self._decoder is not None and joins_byte_tokens(self._decode)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder, None if it has none of those in `vocabulary_files.py`.

        Tokens that only the files beside it add are added, as transformers 5 does. The ids around a text are those of
        the file's post-processor. If it adds none, `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are
        followed.
        Raises ValueError if the file, or one with a chat template, is unreadable.
        """
        found = read_vocabulary(folder)
        if found is None:
            return None
        backend, prefix, suffix = found.backend, [], []
        if backend.num_special_tokens_to_add(is_pair=False) == 0:
            settings = read_settings(folder, "special_tokens_map.json") | read_settings(folder, "tokenizer_config.json")
            prefix = _special_token(backend, settings, "bos_token") if settings.get("add_bos_token") else []
            suffix = _special_token(backend, settings, "eos_token") if settings.get("add_eos_token") else []
        return cls(
            backend,
            prefix=prefix,
            suffix=suffix,
            source=printable(found.path),
            chat_templates=read_chat_templates(folder),
            named_tokens=found.named,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> "Tokenizer":
        """The tokenizer, with chat templates, that the key-values of a GGUF file describe.

        metadata: the values by key (`tokenizer.ggml.tokens`, `tokenizer.chat_template`, ...).
        source: the file's name in error messages.
        Raises ValueError for values that are missing or wrong, and for kinds of vocabularies that are not known.
        """
        try:
            backend, templates, named = (
                build_tokenizer(metadata),
                gguf_chat_templates(metadata),
                named_tokens(metadata),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return cls(backend, source=source, chat_templates=templates, named_tokens=named)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError for a tokenizer of another model, with more tokens than the model's vocabulary.

        Added tokens do not count: many models have some that they never saw, and a prompt with one is refused.
        """
        own = self.backend.get_vocab_size(with_added_tokens=False)
        if own > vocab_size:
            raise ValueError(
                f"{self._source} has {own} tokens, but the model's vocabulary has {vocab_size} (vocab_size in "
                "config.json): they belong to different models; put the model's own tokenizer there"
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, by default with the start and end tokens that the model was trained with.

        A text that begins with the start token itself gets no second one.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be Unicode, but its character {error.start} is half of one (a lone surrogate, "
                f"{printable(text[error.start])})"
            ) from None
        with library_errors(f"{self._source} cannot encode the text"):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if not add_special_tokens:
            return encoding.ids
        tokens, is_added = encoding.ids, encoding.special_tokens_mask
        tokens, is_added = [*self._prefix, *tokens, *self._suffix], [*[1] * len(self._prefix), *is_added]
        own = next((token for token, added in zip(tokens, is_added, strict=False) if not added), None)
        return tokens[1:] if own is not None and is_added[0] and own == tokens[0] else tokens

    def apply_chat_template(
        self,
        messages: Any,
        *,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as the model was trained with it.

        messages: a list of mappings with "role" and "content": a text, or parts like {"type": "text", "text": ...}.
        tools: a list of JSON schemas of functions that the model may call.
        documents: a list of mappings with "title" and "text" that the answer is to rest on.
        chat_template: the name of one of the model's templates, or a template; by default the model's own.
        add_generation_prompt: end with what begins the model's answer.
        continue_final_message: end within the last message, which the model continues.
        variables: further values that the template asks for (`enable_thinking=False`).
        Raises ValueError for messages that are none, for a template that is missing or fails, or that refuses them.
        """
        template = select_template(self.chat_templates, chat_template, tools is not None, self._source)
        return render_chat(
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=self.named_tokens | variables,
        )

    def encode_chat(self, messages: Any, **options: Any) -> list[int]:
        """The token ids of a conversation, with the options of `apply_chat_template`.

        No start or end token is added to those that the template writes.
        """
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that form no character become U+FFFD, ids that no token has are left out."""
        return self.join(self.token_texts(tokens, skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for the ids that follow a prompt's, as they arrive."""
        return StreamDecoder(self, prompt=prompt, skip_special_tokens=skip_special_tokens)

    def token_texts(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> list[str]:
        """The vocabulary's texts of these ids, from which `join` makes the text."""
        texts = (self._token_text(int(token), skip_special_tokens) for token in tokens)
        return [text for text in texts if text is not None]

    def _token_text(self, token: int, skip_special_tokens: bool) -> str | None:
        if token in self.special_tokens:
            return None if skip_special_tokens else self.special_tokens[token]
        return self.backend.id_to_token(token) if 0 <= token < 2**32 else None

    def join(self, token_texts: Sequence[str]) -> str:
        """The text of these vocabulary entries.

        With byte fallback (Llama 1 and 2, Mistral, Gemma) each character is decoded separately: the library would turn
        all consecutive bytes into U+FFFD as soon as one of them is wrong. So the text of the first tokens is the start
        of the text of all, except for an unfinished character at their end.
        """
        if self._decoder is None:
            return " ".join(token_texts)
        return self._decode(between_characters(token_texts) if self._has_byte_tokens else list(token_texts))

    def _decode(self, token_texts: list[str]) -> str:
        with library_errors(f"{self._source} cannot decode tokens"):
            return self._decoder.decode(token_texts)


def _special_token(backend: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> list[int]:
    """The id of a special token, given as its text or as an object with its text under "content"; empty if unknown."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(text) if isinstance(text, str) else None
    return [] if token_id is None else [token_id]
