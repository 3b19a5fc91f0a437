"""The target drafts for itself, through an early exit with a small trained adapter; verified by exact match."""

from typing import TYPE_CHECKING, Any

from decodax.decoding.drafters.kangaroo import Kangaroo
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.trained_part import find_part
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 6


class KangarooDraft(Strategy):
    """A draft of at most `draft_tokens` tokens, ended where the exit is less than 60 % sure; the part says which exit.

    Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911.
    """

    trained_part = Kangaroo.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("kangaroo ends each draft by its confidence: give draft_tokens, the most, as a number")
        part = find_part("kangaroo", lm, draft)
        max_tokens = DRAFT_TOKENS if draft_tokens is None else draft_tokens
        return Speculation(Kangaroo(lm.model, part.shape["exit_layer"], max_tokens), ExactMatch(), part.params)
