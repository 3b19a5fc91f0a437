"""Holds what vocabularies of every format need: merges that follow from ranks, start and end tokens, errors."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import tokenizers
from tokenizers import processors

from decodax.core.printable import printable


def merges_by_rank(ranked: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the first token first.

    So the pair that makes the first token is merged first, as in formats that rank tokens and list no merges.
    ranked: the tokens that are merged or made, the first to be made first.

    >>> merges_by_rank(["a", "b", "c", "bc", "abc", "ab"])
    [('b', 'c'), ('a', 'bc'), ('ab', 'c'), ('a', 'b')]
    """
    rank = {token: index for index, token in enumerate(ranked)}
    merges = []
    for token in rank:
        splits = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in rank and right in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def refuse_repeated(tokens: Sequence[str]) -> None:
    """Raises ValueError if two of these entries of a vocabulary are the same."""
    if len(set(tokens)) == len(tokens):
        return
    seen: set[str] = set()
    twice = next(token for token in tokens if token in seen or seen.add(token))
    raise ValueError(f"a vocabulary must have each token once, got {printable(repr(twice))} twice")


def add_markers(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes the tokenizer put a start token before a text, and an end token after it; None for neither.

    Raises ValueError for a token that the vocabulary lacks.
    """
    ids: dict[str, int] = {}
    for token in (bos, eos):
        token_id = None if token is None else backend.token_to_id(token)
        if token is not None and token_id is None:
            raise ValueError(f"the vocabulary lacks {printable(repr(token))}, which is to begin or end a text")
        if token is not None and token_id is not None:
            ids[token] = token_id
    if ids:
        template = [token for token in (bos, "$A", eos) if token is not None]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns what the library raises into a ValueError: plain Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {printable(error)}") from error
        raise
