"""Drafts with the model's own first layers: at a fixed exit (LayerSkip), or at one chosen in every round (DEL).

Both need a model that was taught to exit early, and no weights beside it: a published LayerSkip checkpoint, or any
model with the adapter that `decodax train layer_skip` made (`decodax.load(..., adapter=FOLDER)`). They are lossless:
their tokens are those of plain decoding with that same model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import shown, whole_number
from decodax.decoding.drafters.del_choice import DynamicExit
from decodax.decoding.drafters.early_layers import EarlyLayers
from decodax.decoding.exit_choice import best_exit
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

MAX_TOKENS = 6  # of a draft from a fixed exit, unless a number is given


@dataclass(frozen=True)
class LayerSkip(DraftingStrategy):
    """A fixed exit layer and draft length.

    LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710.

    exit_layer: layers that draft; None for the one with the most expected tokens per layer, by the agreement measured
        in the adapter's training. Without an adapter, a quarter of the layers.
    draft_tokens: None for the number chosen with that exit layer, at most 6; 6 for a layer that was given.
    """

    draft_tokens: int | None = None
    exit_layer: int | None = None

    auxiliary_weights = EarlyLayers.auxiliary_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit_layer is not None:
            whole_number("exit_layer", self.exit_layer, least=1)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        _check_no_draft("layer_skip", draft)
        tokens, exit_layer, num_layers = self.draft_tokens, self.exit_layer, lm.config.num_layers
        if exit_layer is None and lm.adapter is None:
            exit_layer = max(1, num_layers // 4)
        elif exit_layer is None:
            agreement = np.asarray(lm.adapter.measured("exit_agreement"))
            shortest, longest = (1, MAX_TOKENS) if tokens is None else (tokens, tokens)
            exit_layer, tokens = map(int, best_exit(agreement, num_layers, longest, shortest))
        return Speculation(EarlyLayers(lm.model, exit_layer, tokens or MAX_TOKENS), ExactMatch())


@dataclass(frozen=True)
class Del(DraftingStrategy):
    """The exit layer and the draft length, up to `draft_tokens`, are chosen in every round.

    DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598.
    """

    draft_tokens: int = 12

    auxiliary_weights = DynamicExit.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        _check_no_draft("del", draft)
        return Speculation(DynamicExit(lm.model, self.draft_tokens), ExactMatch())


def _check_no_draft(name: str, draft: Any) -> None:
    if draft is not None:
        raise ValueError(
            f"{name} drafts with the model's own layers, got draft={shown(draft)}: leave it out. What `decodax train "
            "layer_skip` made is merged when the model is loaded: decodax.load(..., adapter=FOLDER)"
        )
