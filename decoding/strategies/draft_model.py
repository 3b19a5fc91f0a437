"""Drafts with a small language model: a chain, a fixed tree or a sampled tree.

The draft is a folder that `decodax train draft` made, or any model with the same vocabulary; the embedded model has its
own. In greedy rows all three accept by exact match.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.decoding.draft_length import DraftChoice, choose_for
from decodax.decoding.drafters.draft_model import DraftModel
from decodax.decoding.find_draft import find_draft
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers.chain_rejection import ChainRejection
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.decoding.verifiers.tree_rejection_without_replacement import TreeRejectionWithoutReplacement

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class DraftModelChain(DraftingStrategy):
    """A chain drawn from the draft's distribution, verified by rejection sampling.

    Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192.
    """

    draft_tokens: int | str = 4

    can_measure = True
    auxiliary_weights = DraftModel.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation | DraftChoice:
        found, number = find_draft("draft_model", lm, draft), self.draft_tokens
        if isinstance(number, str):
            choice = choose_for(lm, found, batch_size)
            if not choice.num_tokens:
                return choice
            number = choice.num_tokens
        return Speculation(DraftModel.chain(found.lm.model, number), ChainRejection(), found.lm.params)


@dataclass(frozen=True)
class DraftModelTree(DraftingStrategy):
    """A tree of the draft's most probable tokens, its shape chosen by the draft's measured acceptance; exact match.

    Sequoia, arXiv 2402.12374 (the shape of the tree).
    """

    draft_tokens: int = 8

    auxiliary_weights = DraftModel.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        found = find_draft("draft_tree", lm, draft)
        tree = best_tree(found.rank_acceptance, self.draft_tokens)
        return Speculation(DraftModel.top_k(found.lm.model, tree), ExactMatch(), found.lm.params)


@dataclass(frozen=True)
class DraftModelSampledTree(DraftingStrategy):
    """A tree of the same shape whose children are drawn from the draft's distribution without replacement.

    Sequoia, arXiv 2402.12374.
    """

    draft_tokens: int = 8

    auxiliary_weights = DraftModel.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        found = find_draft("draft_sampled_tree", lm, draft)
        tree = best_tree(found.rank_acceptance, self.draft_tokens)
        return Speculation(DraftModel.sampled(found.lm.model, tree), TreeRejectionWithoutReplacement(), found.lm.params)
