"""Quotes untrusted text in error messages: on one line, without control characters, cut short."""

from collections.abc import Collection

_MAX_NAME_LENGTH = 200
_MAX_NAMES, _CUT = 3, "..."


def printable(text: object) -> str:
    r"""The text with control characters escaped, and at most 200 characters.

    A longer text keeps both ends: a path ends with the file's name.

    >>> printable("lm_head\x1b[2J")
    'lm_head\\x1b[2J'
    """
    full = str(text)
    if len(full) > 2 * _MAX_NAME_LENGTH:  # characters that are cut off need no escape
        full = full[:_MAX_NAME_LENGTH] + full[-_MAX_NAME_LENGTH:]
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in full
    )
    if len(escaped) <= _MAX_NAME_LENGTH:
        return escaped
    kept = _MAX_NAME_LENGTH - len(_CUT)
    return escaped[: kept // 2] + _CUT + escaped[-(kept - kept // 2) :]


def printable_list(names: Collection[object], most: int = _MAX_NAMES) -> str:
    r"""The first `most` of these names for an error message, and how many more there are.

    >>> printable_list(["a", "b\n", "c", "d", "e"])
    'a, b\\n, c and 2 more'
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in list(names)[:most]) + rest
