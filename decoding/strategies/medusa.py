"""Medusa: heads beside the model's own guess further tokens, a tree of their guesses is verified by exact match."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodax.decoding.draft_length import DraftChoice, choose_tree_size, latency_curve
from decodax.decoding.drafters.medusa_heads import MedusaHeads
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.trained_part import find_part
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 16
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens per forward among which "auto" chooses


class MedusaTree(Strategy):
    """A fixed tree of `draft_tokens` nodes behind the root, chosen by the measured accuracy of each head's guesses.

    Medusa, arXiv 2401.10774. With "auto" the size is the one that gives most tokens per second by the forwards measured
    here. Heads that were trained together with the model (Medusa-2) bring a change of it: the text is then, token for
    token, that of the changed model. The paper's own acceptance, which is not lossless, is made by hand:
    `Speculation(MedusaHeads(lm.model, parents), TypicalAcceptance(), part.params["heads"])`.
    """

    trained_part = MedusaHeads.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation | DraftChoice:
        part = find_part("medusa", lm, draft)
        accuracy = within_depth(part.rank_accuracy)
        if isinstance(draft_tokens, str):
            seconds = latency_curve(lm.model, lm.params, (1, *SIZES))
            tokens = {size: expected_tokens(accuracy, best_tree(accuracy, size - 1)) for size in SIZES}
            choice = choose_tree_size(seconds, tokens)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        tree = best_tree(accuracy, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
        change, params = part.params.get("low_rank"), None
        if change is not None:
            scale = part.shape["change_scale"]
            params = lm.model.stacked(merged(lm.model.unstacked(lm.params), change, scale))
        return Speculation(MedusaHeads(lm.model, tree), ExactMatch(), part.params["heads"], params=params)


def within_depth(accuracy: Sequence[Sequence[float]]) -> list[list[float]]:
    """The accuracies with no guess right behind the last head, and none quite 0 before: so no tree grows beyond it."""
    return [*([max(share, 1e-9) for share in ranks] for ranks in accuracy), [0.0] * len(accuracy[-1])]
