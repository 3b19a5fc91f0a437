"""Adds the added tokens, special ones among them, of all files of a model folder to a tokenizer's vocabulary.

The vocabulary's file need not have them all. As in transformers 5, `added_tokens_decoder` of `tokenizer_config.json`
adds further ones; if it is missing, `added_tokens.json` and `special_tokens_map.json` do. The named tokens (`bos_token`
and its like) and `extra_special_tokens` (or `additional_special_tokens`) are added as special tokens.

Departs from transformers if files contradict each other about an id: there the token gets another id than the one that
the model was trained with, here that is an error.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import find_file, read_json_object

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_BY_ID = "added_tokens_decoder"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA, _FORMER_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Adds the tokens that the files beside the vocabulary name.

    A token without an id in the files gets its id in the vocabulary, or the next free one.
    Raises ValueError, naming it, for a token with another id than in the files.
    """
    settings = read_settings(folder, _CONFIG)
    extra = _extra(settings, folder / _CONFIG)
    if _BY_ID in settings:
        source = _CONFIG
        by_id = _tokens_by_id(settings[_BY_ID], folder / _CONFIG)
        named = list(_named({folder / _CONFIG: settings}).values())
    else:
        source = _ADDED
        former = read_settings(folder, _MAP)
        named = list(_named({folder / _CONFIG: settings, folder / _MAP: former}).values())
        # The former name counts if the present one has nothing.
        extra = extra + _extra({_EXTRA: former.get(_EXTRA)} if extra else former, folder / _MAP)
        special = {token.content for token in named + extra}
        by_id = _plain_tokens(read_settings(folder, _ADDED), special, folder / _ADDED)
    for token in _missing(backend, by_id, named, extra, own_flags=_BY_ID in settings):
        backend.add_tokens([token])
    check_ids(backend, ((token.content, token_id) for token_id, token in by_id.items()), printable(folder / source))


def named_tokens(folder: Path) -> dict[str, str]:
    """The texts of the tokens to which the files beside the vocabulary give a role, by role (`bos_token`)."""
    settings = read_settings(folder, _CONFIG)
    files = {folder / _CONFIG: settings}
    if _BY_ID not in settings:
        files[folder / _MAP] = read_settings(folder, _MAP)
    return {role: token.content for role, token in _named(files).items()}


def _missing(
    backend: tokenizers.Tokenizer,
    by_id: dict[int, AddedToken],
    named: list[AddedToken],
    extra: list[AddedToken],
    *,
    own_flags: bool,
) -> list[AddedToken]:
    """The tokens that the backend lacks, first the ones with ids, in their order.

    backend: the tokenizer.
    by_id: tokens with ids.
    named: tokens with a role.
    extra: further special tokens.
    own_flags: also return tokens that the backend has with other flags than `by_id` gives them.
    """
    known = {token.content: _described(token) for token in backend.get_added_tokens_decoder().values()}
    by_order = [token for _, token in sorted(by_id.items(), key=lambda item: item[0])]
    new = [
        token
        for token in by_order
        if token.content not in known or (own_flags and known[token.content] != _described(token))
    ]
    for token in new:
        if token.content in {other.content for other in named}:
            token.special = True
    held = {*known, *(token.content for token in new)}
    return new + [token for token in named + extra if token.content not in held]


def check_ids(backend: tokenizers.Tokenizer, tokens: Iterable[tuple[str, int]], where: str) -> None:
    """Raises ValueError for a token that has another id in the backend than in the file at `where`."""
    for content, token_id in tokens:
        found = backend.token_to_id(content)
        if content and found != token_id:
            other = backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            taken = "" if other in (None, content) else f", and {token_id} is {printable(repr(other))}"
            raise ValueError(
                f"{where} gives the added token {printable(repr(content))} the id {token_id}, but in the vocabulary "
                f"(tokenizer.json or tokenizer.model) it is {found}{taken}: ids must be unique and follow on the "
                "vocabulary without a gap; save the tokenizer again with the library that made it"
            )


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder, an empty one if the file is missing."""
    path = find_file(folder, name)
    return {} if path is None else read_json_object(path)


def _tokens_by_id(value: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise ValueError(f"{_BY_ID} in {printable(path)} must be an object whose keys are token ids")
    return {int(key): _token(token, f"{_BY_ID}.{key} in {printable(path)}", None) for key, token in value.items()}


def _plain_tokens(value: dict[str, Any], special: set[str], path: Path) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, texts and ids without flags; special are those that another file names."""
    for text, token_id in value.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**32:
            raise ValueError(
                f"{printable(path)} must give each token an id, got {printable(token_id)} for {printable(repr(text))}"
            )
    if len(set(value.values())) < len(value):
        raise ValueError(f"{printable(path)} must give each token an id of its own, but some have the same one")
    return {
        token_id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, token_id in value.items()
    }


def _named(files: dict[Path, dict[str, Any]]) -> dict[str, AddedToken]:
    """The tokens with a role, by role: the usual ones, then a model's own, like `image_token`; the last file counts."""
    roles: dict[str, tuple[Any, Path]] = {name: (None, Path()) for name in _NAMED}
    for path, settings in files.items():
        extra = settings.get(_EXTRA) or settings.get(_FORMER_EXTRA)
        named = {name: value for name, value in settings.items() if name in _NAMED or _is_role(name, value)}
        named |= extra if isinstance(extra, dict) else {}
        roles |= {name: (value, path) for name, value in named.items()}
    return {
        name: _token(value, f"{name} in {printable(path)}", True)
        for name, (value, path) in roles.items()
        if value is not None and value != ""
    }


def _is_role(name: str, value: Any) -> bool:
    return name.endswith("_token") and isinstance(value, str)


def _extra(settings: dict[str, Any], path: Path) -> list[AddedToken]:
    """The list of further special tokens; an object there gives them roles instead."""
    name = _EXTRA if settings.get(_EXTRA) else _FORMER_EXTRA
    value = settings.get(name) or []
    if not isinstance(value, list | dict):
        raise ValueError(f"{name} in {printable(path)} must be a list of tokens, got {printable(repr(value))}")
    tokens = enumerate(value) if isinstance(value, list) else ()
    return [_token(token, f"{name}.{index} in {printable(path)}", True) for index, token in tokens]


def _token(value: Any, where: str, special: bool | None) -> AddedToken:
    """A token from its text, or from an object with its text under "content" and its flags."""
    fields = {"content": value} if isinstance(value, str) else value
    flags = {name: fields[name] for name in _FLAGS if name in fields} if isinstance(fields, dict) else {}
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f"{where} must be a token's text, or an object with it, got {printable(repr(value))}")
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{where} must have true or false for each of {', '.join(flags)}")
    return AddedToken(fields["content"], **flags | ({} if special is None else {"special": special}))


def _described(token: AddedToken) -> tuple[object, ...]:
    """A token and its flags; the library compares the text alone."""
    return (token.content, *(getattr(token, name) for name in _FLAGS))
