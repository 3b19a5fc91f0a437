"""Drafts with the model's own first layers: at a fixed exit (LayerSkip), or at one chosen in every round (DEL).

Both need a model that was taught to exit early, and no weights beside it: a published LayerSkip checkpoint, or any
model with the adapter that `decodax train layer_skip` made (`decodax.load(..., adapter=FOLDER)`). They are lossless:
their tokens are those of plain decoding with that same model.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.core.arguments import shown
from decodax.decoding.drafters.del_choice import DynamicExit
from decodax.decoding.drafters.early_layers import EarlyLayers
from decodax.decoding.exit_choice import best_exit
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

FIXED_TOKENS, DYNAMIC_TOKENS = 6, 12


class LayerSkip(Strategy):
    """A fixed exit layer and draft length. By default those with the most expected tokens per layer for the agreement
    measured in the adapter's training; without an adapter a quarter of the layers, and FIXED_TOKENS tokens.

    LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710.
    """

    auxiliary_weights = EarlyLayers.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        given = _number("layer_skip", draft, draft_tokens)
        if lm.adapter is None:
            exit_layer, tokens = max(1, lm.config.num_layers // 4), FIXED_TOKENS
        else:
            agreement = np.asarray(lm.adapter.measured("exit_agreement"))
            shortest, longest = (1, FIXED_TOKENS) if given is None else (max(1, given),) * 2
            exit_layer, tokens = map(int, best_exit(agreement, lm.config.num_layers, longest, shortest))
        return Speculation(EarlyLayers(lm.model, exit_layer, tokens if given is None else given), ExactMatch())


class Del(Strategy):
    """The exit layer and the draft length, up to `draft_tokens`, are chosen in every round.

    DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598.
    """

    auxiliary_weights = DynamicExit.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        given = _number("del", draft, draft_tokens)
        return Speculation(DynamicExit(lm.model, DYNAMIC_TOKENS if given is None else given), ExactMatch())


def _number(name: str, draft: Any, draft_tokens: int | str | None) -> int | None:
    """The given number of tokens, if any. Raises ValueError for options that these strategies do not take."""
    if draft is not None:
        raise ValueError(
            f"{name} drafts with the model's own layers, got draft={shown(draft)}: leave it out. What `decodax train "
            "layer_skip` made is merged when the model is loaded: decodax.load(..., adapter=FOLDER)"
        )
    if isinstance(draft_tokens, str):
        raise ValueError(f"{name} does not choose by this machine's times (draft_tokens='auto'): give it a number")
    return draft_tokens
