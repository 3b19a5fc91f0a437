"""Drafts with the target's own early exit and a small trained adapter; verifies by exact match (Kangaroo)."""

from typing import TYPE_CHECKING, Any

from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.kangaroo import Kangaroo
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 6


class KangarooDraft(Strategy):
    """A draft of at most `draft_tokens` tokens, ended where the confidence is below 60 %; the facts give the exit.

    Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911.
    """

    auxiliary_weights = Kangaroo.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("kangaroo ends each draft by its confidence: give draft_tokens, the most, as a number")
        auxiliary = find_auxiliary_weights("kangaroo", lm, draft)
        max_tokens = DRAFT_TOKENS if draft_tokens is None else draft_tokens
        drafter = Kangaroo(lm.model, auxiliary.shape["exit_layer"], max_tokens)
        return Speculation(drafter, ExactMatch(), auxiliary.params)
