"""The model leaves its layers early where a draft's likely tokens settle what comes next, alone or below a draft tree.

A part is a folder that `decodax train specee` made: the exit predictors, and in `draft/` the draft model that they were
trained with; those of the embedded model use the draft that it brings.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodax.arguments import folder_name, shown
from decodax.decoding.depth.speculative_exit import WEIGHTS, SpeculativeExit
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.strategies._drafts import Draft, find_draft
from decodax.decoding.trained_part import TrainedPart, find_part
from decodax.decoding.tree_choice import best_tree
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.models.load import find_folder

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

PART = "specee"
TREE_TOKENS = 8


class SpeculativeExitAlone(Strategy):
    """Token by token, each through as many layers as its predictors ask for.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850.
    """

    lossless = False
    trained_part = SpeculativeExit.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(
                f"strategy 'specee' drafts no tokens, got draft_tokens={shown(draft_tokens)}: leave it out, or use "
                "'specee_tree'"
            )
        part, found = _find("specee", lm, draft)
        return _speculation(lm, part, found, (-1,))


class SpeculativeExitTree(Strategy):
    """A tree of the draft's likeliest tokens, which the model checks through as many layers as it needs.

    SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850; Sequoia, arXiv
    2402.12374 (the shape of the tree).
    """

    lossless = False
    trained_part = SpeculativeExit.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("draft_tokens='auto' chooses the length of a chain (draft_model): give a tree a number")
        part, found = _find("specee_tree", lm, draft)
        tree = best_tree(found.rank_acceptance, TREE_TOKENS if draft_tokens is None else draft_tokens)
        return _speculation(lm, part, found, tree)


def _find(strategy: str, lm: "LanguageModel", given: Any) -> tuple[TrainedPart, Draft]:
    """The predictors, and the draft that they were trained with: that in their folder, or the embedded model's."""
    part = find_part(PART, lm, given)
    draft = (
        None
        if given is None or isinstance(given, TrainedPart)
        else Path(folder_name("draft", given)).expanduser() / "draft"
    )
    if draft is not None and not draft.is_dir():
        draft = None
    if draft is None and lm.path != find_folder(None):
        raise ValueError(
            f"strategy {strategy!r} needs the draft that {part.name} was trained with, in a folder 'draft' inside it: "
            "give the folder that `decodax train specee` wrote"
        )
    return part, find_draft(strategy, lm, draft)


def _speculation(lm: "LanguageModel", part: TrainedPart, draft: Draft, tree: tuple[int, ...]) -> Speculation:
    hot_layers = tuple(part.measured("hot_layers"))
    depth = SpeculativeExit(schedule="two_level" if hot_layers else "all", hot_layers=hot_layers)
    drafter = Hints(draft.lm.model, tree, num_likely=part.params["hidden"].shape[1] // 3)
    return Speculation(drafter, ExactMatch(), draft.lm.params, depth, lm.params | {WEIGHTS: part.params})
