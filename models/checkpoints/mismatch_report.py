"""Writes the error for weights that do not match a config: few lines that show every kind of mismatch.

A model with experts has tens of thousands of tensors, and what helps most is often listed last: the names that the
files do have.
"""

from collections.abc import Sequence

MOST_LINES = 20  # as of the problems of a config
_MOST_CHARACTERS = 2_500  # of the lines; there are fewer where names are long
_FEWEST_LINES = 3


def mismatch_error(where: str, problems: Sequence[str]) -> ValueError:
    """The error for these problems, one line each, of the weights in the folder `where`.

    The text before a line's colon is its kind; if there are too many lines, each kind is cut to its share.
    """
    most, lines = MOST_LINES, cut(problems, MOST_LINES)
    while most > _FEWEST_LINES and sum(map(len, lines)) > _MOST_CHARACTERS:
        most -= 1
        lines = cut(problems, most)
    return ValueError(
        f"the weights in {where} do not fit its config.json:" + "".join(f"\n  - {line}" for line in lines)
    )


def cut(problems: Sequence[str], most: int) -> list[str]:
    """At most about `most` of these lines: the first of each kind, then how many more there are of it.

    >>> cut(["missing: a", "missing: b", "missing: c", "missing: d", "surplus: x", "surplus: y"], 4)
    ['missing: a', 'missing: b', 'and 2 more missing', 'surplus: x', 'surplus: y']
    """
    kinds: dict[str, list[str]] = {}
    for line in problems:
        kinds.setdefault(line.partition(":")[0], []).append(line)
    shares, left = {}, most
    for position, kind in enumerate(sorted(kinds, key=lambda kind: len(kinds[kind]))):
        shares[kind] = min(len(kinds[kind]), left // (len(kinds) - position))
        left -= shares[kind]
    listed = []
    for kind, lines in kinds.items():
        more = len(lines) - shares[kind]
        listed += lines[: shares[kind]] + ([f"and {more} more {kind}"] if more else [])
    return listed
