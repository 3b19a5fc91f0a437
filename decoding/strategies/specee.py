"""Exits the model's layers early by a draft's likely tokens (SpecEE), with a draft tree or without draft tokens.

The auxiliary weights are a folder that `decodax train specee` made: the exit predictors, and in `draft/` the draft
model that they were trained with; those of the embedded model use its own draft.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import folder_name, shown
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, find_auxiliary_weights
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.early_exit.speculative_exit import WEIGHTS, SpeculativeExit
from decodax.decoding.find_draft import Draft, find_draft
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.models.load import find_folder

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

KIND = "specee"
TREE_TOKENS = 8


class SpeculativeExitAlone(Strategy):
    """No draft tokens; each token runs as many layers as its predictors require.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850.
    """

    lossless = False
    auxiliary_weights = SpeculativeExit.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(
                f"strategy 'specee' drafts no tokens, got draft_tokens={shown(draft_tokens)}: leave it out, or use "
                "'specee_tree'"
            )
        auxiliary, found = _find("specee", lm, draft)
        return _speculation(lm, auxiliary, found, (-1,))


class SpeculativeExitTree(Strategy):
    """A tree of the draft's most probable tokens, which the model verifies with as many layers as predictors require.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850; Sequoia, arXiv
    2402.12374 (the shape of the tree).
    """

    lossless = False
    auxiliary_weights = SpeculativeExit.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("draft_tokens='auto' chooses the length of a chain (draft_model): give a tree a number")
        auxiliary, found = _find("specee_tree", lm, draft)
        tree = best_tree(found.rank_acceptance, TREE_TOKENS if draft_tokens is None else draft_tokens)
        return _speculation(lm, auxiliary, found, tree)


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


def _speculation(lm: "LanguageModel", auxiliary: AuxiliaryWeights, draft: Draft, tree: tuple[int, ...]) -> Speculation:
    hot_layers = tuple(auxiliary.measured("hot_layers"))
    layer_policy = SpeculativeExit(schedule="two_level" if hot_layers else "all", hot_layers=hot_layers)
    drafter = Hints(draft.lm.model, tree, num_likely=auxiliary.params["hidden"].shape[1] // 3)
    return Speculation(drafter, ExactMatch(), draft.lm.params, layer_policy, lm.params | {WEIGHTS: auxiliary.params})
