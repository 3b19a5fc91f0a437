"""Scores given texts on the host: the log-probability of continuations (`decodax.score`), and perplexity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import token_ids, whole_number
from decodax.decoding.continuations import Continuation, encode_continuations
from decodax.decoding.token_scores import TokenScores, token_scores
from decodax.sharding.host import assert_same_on_all_processes

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

MOST_CONTEXT_TOKENS = 2048  # of a window of `perplexity`, by default
_LARGEST_EXPONENT = 709  # exp of it is still a float64


@dataclass(frozen=True)
class Score:
    """What the model says of a continuation.

    logprob: natural logarithm of its probability after the prompt, the sum over its tokens. NaN where the model's
        numbers became NaN or infinite.
    num_tokens: how many tokens it has.
    is_greedy: whether each of them is the most probable one, so that greedy decoding would write it.
    token_logprobs: float32 array, the log-probability of each; None where not asked for (`per_token`).
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    token_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class Perplexity:
    """How well the model predicts a text.

    num_tokens: that were scored.
    negative_log_likelihood: in nats per token.
    context, stride: tokens of a window, and from the beginning of one to that of the next.
    """

    num_tokens: int
    negative_log_likelihood: float
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(negative log-likelihood per token): 1 for a text that is certain, V where all tokens are alike.

        >>> round(Perplexity(100, math.log(8), context=64, stride=32).perplexity, 6)
        8.0
        """
        return math.exp(self.negative_log_likelihood) if self.negative_log_likelihood < _LARGEST_EXPONENT else math.inf


def score(lm: "LanguageModel", prompts: Any, continuations: Any, *, per_token: bool, batch_size: int) -> list[Score]:
    """The scores of continuations, one per prompt; see `decodax.score`."""
    rows = encode_continuations(lm, prompts, continuations)
    context = lm.config.max_position_embeddings
    for index, row in enumerate(rows):
        if len(row.tokens) > context:
            raise ValueError(
                f"a prompt and its continuation must fit in the model's context of {context}, got {row.first} + "
                f"{len(row.tokens) - row.first} tokens in prompt {index}: shorten them"
            )
    _check_processes(lm, rows, batch_size=batch_size)
    scores: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))  # what needs most memory comes first
    for place in range(0, len(order), batch_size):
        indexes = order[place : place + batch_size]
        found = token_scores(lm.model, lm.params, [rows[index] for index in indexes], batch_size)
        for index, of_row in zip(indexes, found, strict=True):
            scores[index] = _score(of_row, per_token)
    return scores


def _score(found: TokenScores, per_token: bool) -> Score:
    total = float(np.sum(found.logprob, dtype=np.float64))
    return Score(total, len(found.logprob), bool(found.is_argmax.all()), found.logprob.copy() if per_token else None)


def perplexity(
    lm: "LanguageModel",
    tokens: Any,
    context: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int = 8,
    on_tokens: Callable[[int], Any] | None = None,
) -> Perplexity:
    """The perplexity of a text, token by token in windows that overlap, as transformers' documentation describes it.

    Each window begins `stride` tokens after the last one, and scores the tokens that the last one did not have. So each
    token but the first is scored once, after at least `context - stride` others (where the text has so many before it);
    with a stride of 1, after `context - 1`.

    tokens: ids [T] of the text.
    context: tokens of a window; by default the model's context, at most 2,048.
    stride: 1 to context - 1; by default half the context.
    batch_size: windows that run at a time.
    on_tokens: called with the number of tokens scored so far, again and again.
    Raises ValueError for sizes that are not possible, less than two tokens, and ids outside the vocabulary.
    Raises ArithmeticError where the model's numbers become NaN or infinite.
    Raises MemoryError when the cache would not fit.
    """
    context, stride = window_sizes(lm, context, stride)
    batch_size = whole_number("batch_size", batch_size, least=1)
    ids = np.asarray(token_ids("tokens", tokens, lm.config.vocab_size), np.int64)
    if len(ids) < 2:
        raise ValueError(f"tokens must be at least 2, as the first one is not scored, got {len(ids)}")
    _check_processes(lm, [Continuation(ids, 1)], batch_size=batch_size, context=context, stride=stride)
    total, num_scored, windows = 0.0, 0, _windows(ids, context, stride)
    while rows := list(islice(windows, batch_size)):
        found = token_scores(lm.model, lm.params, rows, batch_size)
        num_scored += sum(len(of_row.logprob) for of_row in found)
        total += sum(float(np.sum(of_row.logprob, dtype=np.float64)) for of_row in found)
        if not math.isfinite(total):
            raise ArithmeticError("the model's numbers became NaN or infinite, so the text has no perplexity")
        if on_tokens is not None:
            on_tokens(num_scored)
    return Perplexity(num_scored, -total / num_scored, context, stride)


def window_sizes(lm: "LanguageModel", context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride of `perplexity`, with their defaults; ValueError for those that are not possible."""
    most = lm.config.max_position_embeddings
    context = min(most, MOST_CONTEXT_TOKENS) if context is None else whole_number("context", context, least=2)
    if context > most:
        raise ValueError(f"context must be at most {most} (tokens of the model's context), got {context}")
    stride = context // 2 if stride is None else whole_number("stride", stride, least=1)
    if stride >= context:
        raise ValueError(
            f"stride must be in 1..{context - 1} (less than the context of {context}, so that windows overlap), got "
            f"{stride}"
        )
    return context, stride


def _windows(ids: np.ndarray, context: int, stride: int) -> Iterator[Continuation]:
    scored = 1  # all tokens before this one
    for begin in range(0, len(ids), stride):
        if scored == len(ids):
            return
        end = min(begin + context, len(ids))
        yield Continuation(ids[begin:end], scored - begin)
        scored = end


def _check_processes(lm: "LanguageModel", rows: list[Continuation], **sizes: int) -> None:
    """Raises ValueError, in every process of a run over several, where some process was given other arguments."""
    texts = b"".join(row.tokens.tobytes() + f"/{row.first}/".encode() for row in rows)
    numbers = {name: str(size) for name, size in sizes.items()}
    assert_same_on_all_processes(lm.model.execution.mesh, {"prompts and continuations": texts} | numbers)
