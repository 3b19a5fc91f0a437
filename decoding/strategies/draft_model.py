"""Drafts with a small language model: a chain, a fixed tree or a sampled tree.

The draft is a folder that `decodax train draft` made, or any model with the same vocabulary; the embedded model has its
own. In greedy rows all three accept by exact match.
"""

from typing import TYPE_CHECKING, Any

from decodax.decoding.draft_length import DraftChoice, choose_for
from decodax.decoding.drafters.draft_model import DraftModel
from decodax.decoding.find_draft import Draft, find_draft
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers.chain_rejection import ChainRejection
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.decoding.verifiers.tree_rejection_without_replacement import TreeRejectionWithoutReplacement

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

CHAIN_TOKENS, TREE_TOKENS = 4, 8


class DraftModelChain(Strategy):
    """A chain drawn from the draft's distribution, verified by rejection sampling.

    Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192.
    """

    auxiliary_weights = DraftModel.auxiliary_weights

    @staticmethod
    def build(
        lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1
    ) -> Speculation | DraftChoice:
        found = find_draft("draft_model", lm, draft)
        if isinstance(draft_tokens, str):
            choice = choose_for(lm, found, batch_size)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        drafter = DraftModel.chain(found.lm.model, CHAIN_TOKENS if draft_tokens is None else draft_tokens)
        return Speculation(drafter, ChainRejection(), found.lm.params)


class DraftModelTree(Strategy):
    """A tree of the draft's most probable tokens, its shape chosen by the draft's measured acceptance; exact match.

    Sequoia, arXiv 2402.12374 (the shape of the tree).
    """

    auxiliary_weights = DraftModel.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        found = find_draft("draft_tree", lm, draft)
        return Speculation(DraftModel.top_k(found.lm.model, _tree(found, draft_tokens)), ExactMatch(), found.lm.params)


class DraftModelSampledTree(Strategy):
    """A tree of the same shape whose children are drawn from the draft's distribution without replacement.

    Sequoia, arXiv 2402.12374.
    """

    auxiliary_weights = DraftModel.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        found = find_draft("draft_sampled_tree", lm, draft)
        drafter = DraftModel.sampled(found.lm.model, _tree(found, draft_tokens))
        return Speculation(drafter, TreeRejectionWithoutReplacement(), found.lm.params)


def _tree(draft: Draft, draft_tokens: int | str | None) -> tuple[int, ...]:
    if isinstance(draft_tokens, str):
        raise ValueError("draft_tokens='auto' chooses the length of a chain (draft_model): give a tree a number")
    return best_tree(draft.rank_acceptance, TREE_TOKENS if draft_tokens is None else draft_tokens)
