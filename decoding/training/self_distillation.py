"""Writes training text with the model itself, since its auxiliary weights will have to predict the model's own text.

Medusa, arXiv 2401.10774 (section 2.3.2): seed prompts from any text, answered by the model. Departs from the paper in
that a seed is a piece of a document and not a question, and that what is kept is seed and continuation.
"""

from collections.abc import Sequence

import numpy as np

from decodax.decoding.generation import generate
from decodax.decoding.options import GenerateOptions
from decodax.models.load import LanguageModel

ROWS = 64  # continued in one batch


def self_distilled(
    lm: LanguageModel,
    documents: Sequence[np.ndarray],
    count: int,
    *,
    seed_tokens: int = 32,
    new_tokens: int = 224,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """`count` documents of token ids: pieces of `documents`, continued by the model.

    seed_tokens: tokens of a piece, from a random place of `documents`.
    new_tokens: after which a continuation ends, unless the model's end token comes first.
    temperature: at 0 the documents repeat themselves sooner than at 0.7, say.
    seed: the same one gives the same documents.
    Raises ValueError when no document is as long as a seed, or seed and continuation exceed the context.
    """
    context = lm.config.max_position_embeddings
    if min(count, seed_tokens, new_tokens) < 1 or seed_tokens + new_tokens > context:
        raise ValueError(
            "count, seed_tokens and new_tokens must be at least 1, and the last two together at most the context of "
            f"{context}, got {count}, {seed_tokens} and {new_tokens}"
        )
    places = np.asarray([max(0, len(ids) - seed_tokens + 1) for ids in documents], np.int64)
    if not places.sum():
        raise ValueError(f"no document holds the {seed_tokens} tokens of a seed: give longer texts or shorter seeds")
    draw = np.random.default_rng(seed)
    ends = np.cumsum(places)
    seeds = []
    for place in draw.integers(0, ends[-1], count):
        index = int(np.searchsorted(ends, place, side="right"))
        start = int(place - ends[index] + places[index])
        seeds.append(np.asarray(documents[index][start : start + seed_tokens], np.int32))
    written = []
    for first in range(0, count, ROWS):
        rows = seeds[first : first + ROWS]
        own = (seed * count + np.arange(first, first + len(rows))) % 2**31
        options = GenerateOptions(max_new_tokens=new_tokens, temperature=temperature, seed=own)
        found = generate(lm, rows, options).tokens
        written += [np.concatenate([row, new]).astype(np.int32) for row, new in zip(rows, found, strict=True)]
    return written
