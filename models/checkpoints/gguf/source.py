"""Presents a model in GGUF as a model source: the small files of a Hugging Face folder, tensors, a tokenizer."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.gguf.config import TOKENS, GGUFConfig, read_gguf_config
from decodax.models.checkpoints.gguf.files import GGUFFiles, open_files
from decodax.models.checkpoints.gguf.names import named_tensors
from decodax.models.checkpoints.gguf.tensors import GGUFTensor
from decodax.models.tokenizers.gguf_vocabulary import build_tokenizer
from decodax.models.tokenizers.tokenizer import Tokenizer

CHAT_TEMPLATE = "chat_template.jinja"
_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# Tokens that end a turn, and with it the text, as in llama.cpp: not every file names them in its key-values.
_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
_NAMED_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True, eq=False)
class GGUFSource:
    """A model in GGUF (`models/checkpoints/model_source.py` says what its methods do).

    path: what the user named: a file, one of the files of a split model, or the folder that it is in.
    file: the file, or one of them.
    """

    path: Path
    file: Path

    @cached_property
    def files(self) -> GGUFFiles:
        return open_files(self.file)

    @cached_property
    def _config(self) -> GGUFConfig:
        try:
            config = read_gguf_config(self.files)
        except ValueError as error:
            raise ValueError(f"{printable(self.file)}: {error}") from error
        if config.notes:
            warnings.warn(f"{printable(self.file)}: {'; '.join(config.notes)}", stacklevel=2)
        return config

    def where(self, name: str) -> str:
        return str(self.file)

    def read(self, name: str) -> bytes | None:
        if name not in ("config.json", *self.small_files()):
            return None
        if name == CHAT_TEMPLATE:
            return self._template.encode()
        if name == "tokenizer.json":
            return build_tokenizer(self.files.metadata).to_str(pretty=False).encode()
        fields = {
            "config.json": lambda: self._config.fields,
            "tokenizer_config.json": lambda: _tokenizer_settings(self.files.metadata),
            "generation_config.json": lambda: _generation_settings(self.files.metadata),
        }
        return (json.dumps(fields[name](), indent=2) + "\n").encode()

    def small_files(self) -> tuple[str, ...]:
        templates = (CHAT_TEMPLATE,) if self._template else ()
        tokenizers = ("tokenizer.json", "tokenizer_config.json") if TOKENS in self.files.metadata else ()
        return (*templates, "generation_config.json", *tokenizers)

    def weight_files(self) -> list[Path]:
        return list(self.files.paths)

    def holds_weights(self) -> bool:
        return True

    def tensors(self) -> Mapping[str, GGUFTensor]:
        fields, architecture = self._config.fields, self._config.architecture
        heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        return named_tensors(self.files.tensors, architecture, *heads)

    def tokenizer(self) -> Tokenizer | None:
        if TOKENS not in self.files.metadata:
            return None
        return Tokenizer.from_gguf(self.files.metadata, source=printable(self.file))

    @property
    def _template(self) -> str:
        template = self.files.metadata.get("tokenizer.chat_template", "")
        return template if isinstance(template, str) else ""


def _tokens(metadata: Mapping[str, Any]) -> list[Any]:
    tokens = metadata.get(TOKENS)
    return tokens if isinstance(tokens, list) else []


def _generation_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that end a text, as in a `generation_config.json`."""
    tokens = _tokens(metadata)
    named = [metadata[key] for key in _END_KEYS if type(metadata.get(key)) is int]
    by_text = [tokens.index(text) for text in _END_TEXTS if text in tokens]
    return {"eos_token_id": list(dict.fromkeys([*named, *by_text]))}


def _tokenizer_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The named tokens, as in a `tokenizer_config.json`."""
    tokens, settings = _tokens(metadata), {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in _NAMED_TOKENS.items():
        token = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if type(token) is int and 0 <= token < len(tokens):
            settings[theirs] = tokens[token]
    return settings
