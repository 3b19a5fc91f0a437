"""Drafts with a small language model that decodes by parallel prompt decoding itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import whole_number
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.nested import NestedDraft
from decodax.decoding.drafters.prompt_tokens import PromptTokens
from decodax.decoding.find_draft import find_draft
from decodax.decoding.prompt_tree import dynamic_trees
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class PromptedDraft(DraftingStrategy):
    """A draft model whose chain comes from parallel prompt decoding; its prompt tokens are in its folder, under `ppd`.

    Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628.

    draft_model_nodes: tokens of one forward of the draft model.
    """

    draft_tokens: int = 4
    draft_model_nodes: int = 16

    auxiliary_weights = NestedDraft.auxiliary_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("draft_model_nodes", self.draft_model_nodes, least=1)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        found = find_draft("draft_ppd", lm, draft).lm
        auxiliary = find_auxiliary_weights("ppd", found, found.path / "ppd")
        trees = dynamic_trees(auxiliary.rank_accuracy, self.draft_model_nodes)
        inner = speculative(found.model, PromptTokens(found.model, trees), ExactMatch())
        drafter = NestedDraft(inner, self.draft_tokens)
        return Speculation(drafter, ExactMatch(), {"model": found.params, "drafter": auxiliary.params})
