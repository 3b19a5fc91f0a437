"""Drafts by copying from the text so far (prompt lookup); verifies by exact match."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import shown, whole_number
from decodax.decoding.drafters.prompt_lookup import PromptLookup
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class PromptLookupChain(DraftingStrategy):
    """Drafts what followed the last few tokens earlier in the text; needs no training.

    Inference with Reference, arXiv 2304.04487.

    max_ngram, min_ngram: how many last tokens are looked up, the most first.
    """

    draft_tokens: int = 8
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_ngram", "min_ngram"):
            whole_number(name, getattr(self, name), least=1)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        if draft is not None:
            raise ValueError(f"prompt_lookup needs no auxiliary weights, got draft={shown(draft)}: leave it out")
        return Speculation(PromptLookup(self.draft_tokens, self.max_ngram, self.min_ngram), ExactMatch())
