"""Builds a tokenizer from Mistral's `tekken.json`: byte-level BPE whose merges follow from the ranks of the tokens.

Special tokens have the first ids, and a file of version 3 or before does not list them. As chat templates need it, a
special token in a text is that token; Mistral's own library never makes one from text.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from decodax.core.arguments import is_integer
from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import read_json_object
from decodax.models.tokenizers.vocabulary import library_errors, merges_by_rank, refuse_repeated

BOS, EOS = "<s>", "</s>"
_FIRST_SPECIAL = (
    *("<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MAX_TOKENS = 2**21  # ten times the published vocabularies


def read_tekken(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the library for a file; it adds no start token.

    Raises ValueError, naming the file, for one that is damaged or of another format.
    """
    content = read_json_object(path)
    try:
        tokens, special = _read_tokens(content)
        pattern = content["config"]["pattern"] + ""
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(
            f"{printable(path)} must have config (pattern, default_vocab_size, default_num_special_tokens) and vocab "
            f"(rank and token_bytes of each token), as Mistral's tekken.json: {printable(repr(error))}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {printable(error)}") from error
    with library_errors(f"{printable(path)} is no vocabulary that can be used"):
        refuse_repeated([*special, *tokens])
        vocabulary = {token: index for index, token in enumerate([*special, *tokens])}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges_by_rank(tokens), ignore_merges=True))
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _read_tokens(content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(tokens, special tokens), as byte-level BPE spells them, in the order of their ranks."""
    config = content["config"]
    num_tokens, num_special = config["default_vocab_size"], config["default_num_special_tokens"]
    if not is_integer(num_tokens) or not is_integer(num_special) or not 0 < num_special < num_tokens <= _MAX_TOKENS:
        raise ValueError(
            f"default_num_special_tokens must be below default_vocab_size, and that at most {_MAX_TOKENS:,}, "
            f"got {num_special} and {num_tokens}"
        )
    special = _special(content.get("special_tokens"), num_special)
    characters = _byte_characters()
    ranked: list[str] = []
    for rank, entry in enumerate(content["vocab"][: num_tokens - num_special]):
        if entry["rank"] != rank:
            raise ValueError(f"vocab must be in the order of its ranks, got {printable(entry['rank'])} at {rank}")
        spelling = base64.b64decode(entry["token_bytes"], validate=True)
        ranked.append("".join(characters[byte] for byte in spelling))
    if len(ranked) < num_tokens - num_special:
        raise ValueError(f"vocab must have {num_tokens - num_special} tokens, got {len(ranked)}")
    return ranked, special


def _special(listed: list[dict[str, Any]] | None, number: int) -> list[str]:
    """The texts of the special tokens by id; places without a token of their own have a name with their id."""
    given = dict(enumerate(_FIRST_SPECIAL))
    if listed is not None:
        given = {entry["rank"]: entry["token_str"] for entry in listed}
    return [given.get(index, f"<SPECIAL_{index}>") for index in range(number)]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
