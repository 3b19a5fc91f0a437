"""Copies from the text so far: prompt lookup, verified by exact matching."""

from typing import TYPE_CHECKING, Any

from decodax.arguments import shown
from decodax.decoding.drafters.prompt_lookup import PromptLookup
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 8


class PromptLookupChain(Strategy):
    """What followed the last few tokens earlier in the text is drafted again; needs no training.

    Inference with Reference, arXiv 2304.04487.
    """

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if draft is not None:
            raise ValueError(f"prompt_lookup needs no trained part, got draft={shown(draft)}: leave it out")
        if isinstance(draft_tokens, str):
            raise ValueError("prompt_lookup has no known acceptance to choose a length by: give draft_tokens a number")
        return Speculation(PromptLookup(DRAFT_TOKENS if draft_tokens is None else draft_tokens), ExactMatch())
