"""Drafts by copying from the text so far (prompt lookup); verifies by exact match."""

from typing import TYPE_CHECKING, Any

from decodax.core.arguments import shown
from decodax.decoding.drafters.prompt_lookup import PromptLookup
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 8


class PromptLookupChain(Strategy):
    """Drafts what followed the last few tokens earlier in the text; needs no training.

    Inference with Reference, arXiv 2304.04487.
    """

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if draft is not None:
            raise ValueError(f"prompt_lookup needs no auxiliary weights, got draft={shown(draft)}: leave it out")
        if isinstance(draft_tokens, str):
            raise ValueError("prompt_lookup has no known acceptance to choose a length by: give draft_tokens a number")
        return Speculation(PromptLookup(DRAFT_TOKENS if draft_tokens is None else draft_tokens), ExactMatch())
