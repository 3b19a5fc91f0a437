"""Drafts with the target's own early exit and a small trained adapter; verifies by exact match (Kangaroo)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import share
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.kangaroo import Kangaroo
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class KangarooDraft(DraftingStrategy):
    """A draft of at most `draft_tokens` tokens, ended where the confidence is too low; the facts give the exit.

    Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911.

    confidence: the threshold of the adapter's probability of a token, in 0..1.
    """

    draft_tokens: int = 6
    confidence: float = 0.6

    auxiliary_weights = Kangaroo.auxiliary_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        share("confidence", self.confidence)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        auxiliary = find_auxiliary_weights("kangaroo", lm, draft)
        drafter = Kangaroo(lm.model, auxiliary.shape["exit_layer"], self.draft_tokens, self.confidence)
        return Speculation(drafter, ExactMatch(), auxiliary.params)
