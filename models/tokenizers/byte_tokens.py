"""Decodes vocabularies with byte tokens (`<0x41>`): each character separately, so a wrong byte changes no other."""

from collections.abc import Callable, Sequence

_BYTE_TOKENS = {f"<0x{value:{form}}>": value for value in range(256) for form in ("02X", "02x")}


def joins_byte_tokens(decode: Callable[[list[str]], str]) -> bool:
    """Whether a decoder joins byte tokens into characters, and an empty token between them changes nothing."""
    try:
        texts = [decode(["a", "<0x62>", *between, "<0x63>"]) for between in ([], [""])]
    except ValueError:  # a decoder that cannot decode raises when it is used
        return False
    return all(text.endswith("bc") for text in texts)


def between_characters(token_texts: Sequence[str]) -> list[str]:
    """The same texts with an empty token before each character (or wrong byte) made of byte tokens."""
    values = [_BYTE_TOKENS.get(text, -1) for text in token_texts]
    separated, index = [], 0
    while index < len(values):
        length = 1
        if values[index] >= 0:
            separated.append("")
            length = _character_length(values[index : index + 4])
        separated += token_texts[index : index + length]
        index += length
    return separated


def _character_length(values: Sequence[int]) -> int:
    """The length in bytes of the character that these bytes start with; 1 if they start with none."""
    lead = values[0]
    length = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        bytes(values[:length]).decode("utf-8")
    except ValueError:  # no UTF-8, or not only bytes
        return 1
    return length
