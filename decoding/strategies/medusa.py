"""Drafts a tree from Medusa heads and verifies it by exact match (Medusa-1 and Medusa-2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.draft_length import DraftChoice, choose_tree_size, latency_curve
from decodax.decoding.drafters.medusa_heads import MedusaHeads
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 16
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens per forward among which "auto" chooses


class MedusaTree(Strategy):
    """A fixed tree of `draft_tokens` nodes after the root, chosen by the measured accuracy of each head's tokens.

    Medusa, arXiv 2401.10774. With "auto" the size is the one with the most tokens per second by measured forwards.
    Heads that were trained together with the model (Medusa-2) come with a LoRA adapter: the text is then, token for
    token, that of the adapted model. For the paper's own acceptance, which is not lossless, build
    `Speculation(MedusaHeads(lm.model, parents), TypicalAcceptance(), auxiliary.params["heads"])`.
    """

    auxiliary_weights = MedusaHeads.auxiliary_weights

    @staticmethod
    def build(
        lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1
    ) -> Speculation | DraftChoice:
        auxiliary = find_auxiliary_weights("medusa", lm, draft)
        accuracy = within_depth(auxiliary.rank_accuracy)
        if isinstance(draft_tokens, str):
            seconds = latency_curve(lm.model, lm.params, (1, *SIZES), batch_size=batch_size)
            tokens = {size: expected_tokens(accuracy, best_tree(accuracy, size - 1)) for size in SIZES}
            choice = choose_tree_size(seconds, tokens)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        tree = best_tree(accuracy, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
        adapter, params = auxiliary.params.get("low_rank"), None
        if adapter is not None:
            scale = auxiliary.shape["change_scale"]
            params = lm.model.stacked(merged(lm.model.unstacked(lm.params), adapter, scale))
        return Speculation(MedusaHeads(lm.model, tree), ExactMatch(), auxiliary.params["heads"], params=params)


def within_depth(accuracy: Sequence[Sequence[float]]) -> list[list[float]]:
    """The accuracies, at least 1e-9, and 0 after the last head, so that no tree is deeper than there are heads."""
    return [*([max(share, 1e-9) for share in ranks] for ranks in accuracy), [0.0] * len(accuracy[-1])]
