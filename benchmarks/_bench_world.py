"""Loads what the decoding benchmark runs on: the embedded model, its draft, prompts and held-out text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from decodax.decoding.training.text_windows import cut
from decodax.models.load import LanguageModel, load
from decodax.scripts import demo_corpus


@dataclasses.dataclass(frozen=True)
class World:
    """Models and texts of the benchmark.

    lm: the target in float32.
    draft: its draft model, as for `draft=` of the strategies (None: the embedded one).
    prompts: token ids, held out of all training.
    heldout: windows of held-out text, for measures on given text.
    train: windows of the training text, for choosing a tree's shape, never for measures.
    """

    lm: LanguageModel
    draft: Path | LanguageModel | None
    prompts: list[np.ndarray]
    heldout: Int[np.ndarray, "W T_plus_1"]
    train: Int[np.ndarray, "W T_plus_1"]


def embedded(draft: Path | None, *, num_prompts: int, max_prompt: int, num_windows: int, window_tokens: int) -> World:
    """The embedded model on code of the packages held out of its training and of its draft's.

    max_prompt: tokens of a prompt; of a longer one only the last are used.
    """
    lm = load(dtype="float32")
    assert lm.tokenizer is not None
    corpus = demo_corpus.collect()
    prompts = [
        np.asarray(lm.tokenizer.encode(text), np.int32)[-max_prompt:]
        for text in demo_corpus.heldout_prompts(num_prompts, corpus=corpus)
    ]
    code = [[d.text for d in split if not d.is_test] for split in (corpus.heldout, corpus.train)]
    num_tokens = num_windows * window_tokens
    windows = [spread_windows(lm, texts, num_tokens, window_tokens) for texts in code]
    return World(lm, draft, prompts, *windows)


def spread_windows(
    lm: LanguageModel, texts: Sequence[str], num_tokens: int, size: int
) -> Int[np.ndarray, "W T_plus_1"]:
    """Windows of `size` tokens, about `num_tokens` in all, from documents spread evenly over the texts."""
    assert lm.tokenizer is not None
    stream, order = np.zeros(0, np.int32), np.random.default_rng(0).permutation(len(texts))
    for index in order:
        if len(stream) > num_tokens + 1:
            break
        ids = [*lm.end_token_ids[:1], *lm.tokenizer.encode(texts[index])]
        stream = np.concatenate([stream, np.asarray(ids, np.int32)])
    return cut(stream[: num_tokens + 1], size)


def deal(prompts: Sequence[np.ndarray], batch: int) -> list[list[np.ndarray]]:
    """Batches of mixed length: from the shortest to the longest prompt, dealt out in turn.

    >>> [[len(ids) for ids in row] for row in deal([np.zeros(n) for n in (4, 1, 3, 2)], 2)]
    [[1, 3], [2, 4]]
    """
    order = sorted(prompts, key=len)
    count = len(order) // batch
    return [list(order[first : count * batch : count]) for first in range(count)]
