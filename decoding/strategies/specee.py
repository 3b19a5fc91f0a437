"""Exits the model's layers early by a draft's likely tokens (SpecEE), with a draft tree or without draft tokens.

The auxiliary weights are a folder that `decodax train specee` made: the exit predictors, and in `draft/` the draft
model that they were trained with; those of the embedded model use its own draft.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import folder_name, share
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, find_auxiliary_weights
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.early_exit.speculative_exit import WEIGHTS, SpeculativeExit
from decodax.decoding.find_draft import Draft, find_draft
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation, Strategy
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.models.load import find_folder

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

KIND = "specee"


@dataclass(frozen=True)
class SpeculativeExitAlone(Strategy):
    """No draft tokens; each token runs as many layers as its predictors require.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850.

    threshold: of a predictor's probability that the token is final, in 0..1; 1 for no exits.
    """

    threshold: float = 0.5

    lossless = False
    auxiliary_weights = SpeculativeExit.auxiliary_weights

    def __post_init__(self) -> None:
        share("threshold", self.threshold)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        return _speculation(lm, *_find("specee", lm, draft), (-1,), self.threshold)


@dataclass(frozen=True)
class SpeculativeExitTree(DraftingStrategy):
    """A tree of the draft's most probable tokens, which the model verifies with as many layers as predictors require.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850; Sequoia, arXiv
    2402.12374 (the shape of the tree).

    threshold: of a predictor's probability that the token is final, in 0..1; 1 for no exits.
    """

    draft_tokens: int = 8
    threshold: float = 0.5

    lossless = False
    auxiliary_weights = SpeculativeExit.auxiliary_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        share("threshold", self.threshold)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        auxiliary, found = _find("specee_tree", lm, draft)
        tree = best_tree(found.rank_acceptance, self.draft_tokens)
        return _speculation(lm, auxiliary, found, tree, self.threshold)


def _find(strategy: str, lm: "LanguageModel", given: Any) -> tuple[AuxiliaryWeights, Draft]:
    """The predictors, and the draft that they were trained with: that in their folder, or the embedded model's."""
    auxiliary = find_auxiliary_weights(KIND, lm, given)
    draft = (
        None
        if given is None or isinstance(given, AuxiliaryWeights)
        else Path(folder_name("draft", given)).expanduser() / "draft"
    )
    if draft is not None and not draft.is_dir():
        draft = None
    if draft is None and lm.path != find_folder(None):
        raise ValueError(
            f"strategy {strategy!r} needs the draft that {auxiliary.name} was trained with, in a folder 'draft' "
            "inside it: give the folder that `decodax train specee` wrote"
        )
    return auxiliary, find_draft(strategy, lm, draft)


def _speculation(
    lm: "LanguageModel", auxiliary: AuxiliaryWeights, draft: Draft, tree: tuple[int, ...], threshold: float
) -> Speculation:
    hot_layers = tuple(auxiliary.measured("hot_layers"))
    layer_policy = SpeculativeExit(threshold, "two_level" if hot_layers else "all", hot_layers)
    drafter = Hints(draft.lm.model, tree, num_likely=auxiliary.params["hidden"].shape[1] // 3)
    return Speculation(drafter, ExactMatch(), draft.lm.params, layer_policy, lm.params | {WEIGHTS: auxiliary.params})
