"""Drafts with a small language model that decodes by parallel prompt decoding itself."""

from typing import TYPE_CHECKING, Any

from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.nested import NestedDraft
from decodax.decoding.drafters.prompt_tokens import PromptTokens
from decodax.decoding.find_draft import find_draft
from decodax.decoding.prompt_tree import dynamic_trees
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 4
INNER_NODES = 16  # tokens of one forward of the draft model


class PromptedDraft(Strategy):
    """A draft model whose chain comes from parallel prompt decoding; its prompt tokens are in its folder, under `ppd`.

    Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628.
    """

    auxiliary_weights = NestedDraft.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("draft_tokens='auto' is for draft_model and ppd: give draft_ppd a number")
        found = find_draft("draft_ppd", lm, draft).lm
        auxiliary = find_auxiliary_weights("ppd", found, found.path / "ppd")
        trees = dynamic_trees(auxiliary.rank_accuracy, INNER_NODES)
        inner = speculative(found.model, PromptTokens(found.model, trees), ExactMatch())
        drafter = NestedDraft(inner, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
        return Speculation(drafter, ExactMatch(), {"model": found.params, "drafter": auxiliary.params})
