"""Drafts a tree from trained prompt tokens and verifies it by exact match (parallel prompt decoding, PPD)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.draft_length import DraftChoice, choose_tree_size, latency_curve
from decodax.decoding.drafters.prompt_tokens import PromptTokens
from decodax.decoding.prompt_tree import dynamic_trees, stationary_expected_tokens
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens per forward among which "auto" chooses


@dataclass(frozen=True)
class ParallelPrompt(DraftingStrategy):
    """Dynamic sparse trees from prompt tokens; `draft_tokens` counts all nodes after the root, prompt tokens too.

    Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628. With
    "auto" the size is the one with the most tokens per second by measured forwards.
    """

    draft_tokens: int | str = 23

    can_measure = True
    auxiliary_weights = PromptTokens.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation | DraftChoice:
        auxiliary = find_auxiliary_weights("ppd", lm, draft)
        accuracy, ensemble = auxiliary.rank_accuracy, auxiliary.params["embedding"].shape[1]
        draft_tokens = self.draft_tokens
        if isinstance(draft_tokens, str):
            choice = _choose_size(lm, accuracy, ensemble, batch_size)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        size = 1 + draft_tokens
        if size < _smallest(accuracy, ensemble):
            raise ValueError(
                f"draft_tokens must be at least {_smallest(accuracy, ensemble) - 1} for ppd (one candidate, and the "
                f"prompt tokens after it and the root), got {size - 1}"
            )
        trees = dynamic_trees(accuracy, size, ensemble)
        return Speculation(PromptTokens(lm.model, trees, ensemble), ExactMatch(), auxiliary.params)


def _choose_size(
    lm: "LanguageModel", accuracy: Sequence[Sequence[float]], ensemble: int, batch_size: int
) -> DraftChoice:
    """The size with the most tokens per second, by measured times of forwards; takes seconds, mostly of compiling."""
    smallest = _smallest(accuracy, ensemble)
    sizes = (1, *(size for size in SIZES if size >= smallest))
    seconds = latency_curve(lm.model, lm.params, sizes, batch_size=batch_size)
    tokens = {
        size: stationary_expected_tokens(accuracy, dynamic_trees(accuracy, size, ensemble))
        for size in seconds
        if size > 1
    }
    return choose_tree_size(seconds, tokens)


def _smallest(accuracy: Sequence[Sequence[float]], ensemble: int) -> int:
    """Nodes of the smallest tree: the root with prompt tokens for all distances, and one candidate with one."""
    return len(accuracy) * ensemble + ensemble + 2
