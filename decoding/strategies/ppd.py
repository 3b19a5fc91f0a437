"""Parallel prompt decoding: trained prompt tokens guess, a tree of their guesses is verified by exact match."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodax.decoding.draft_length import DraftChoice, choose_tree_size, latency_curve
from decodax.decoding.drafters.prompt_tokens import PromptTokens
from decodax.decoding.prompt_tree import dynamic_trees, expected_tokens
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.trained_part import find_part
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 23
SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens per forward among which "auto" chooses


class ParallelPrompt(Strategy):
    """Dynamic sparse trees of prompt tokens' guesses; `draft_tokens` counts all nodes behind the root, prompts too.

    Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628. With
    "auto" the size is the one that gives most tokens per second by the forwards measured here.
    """

    trained_part = PromptTokens.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation | DraftChoice:
        part = find_part("ppd", lm, draft)
        accuracy, ensemble = part.rank_accuracy, part.params["embedding"].shape[1]
        if isinstance(draft_tokens, str):
            choice = _choose_size(lm, accuracy, ensemble)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        size = 1 + (DRAFT_TOKENS if draft_tokens is None else draft_tokens)
        if size < _smallest(accuracy, ensemble):
            raise ValueError(
                f"draft_tokens must be at least {_smallest(accuracy, ensemble) - 1} for ppd (one guess, and the prompt "
                f"tokens behind it and the root), got {size - 1}"
            )
        trees = dynamic_trees(accuracy, size, ensemble)
        return Speculation(PromptTokens(lm.model, trees, ensemble), ExactMatch(), part.params)


def _choose_size(lm: "LanguageModel", accuracy: Sequence[Sequence[float]], ensemble: int) -> DraftChoice:
    """The size that gives most tokens per second, by measured times of forwards; takes seconds, mostly compiling."""
    smallest = _smallest(accuracy, ensemble)
    seconds = latency_curve(lm.model, lm.params, (1, *(size for size in SIZES if size >= smallest)))
    tokens = {size: expected_tokens(accuracy, dynamic_trees(accuracy, size, ensemble)) for size in seconds if size > 1}
    return choose_tree_size(seconds, tokens)


def _smallest(accuracy: Sequence[Sequence[float]], ensemble: int) -> int:
    """Nodes of the smallest tree: the root with prompt tokens for all distances, one guess with one for the next."""
    return len(accuracy) * ensemble + ensemble + 2
