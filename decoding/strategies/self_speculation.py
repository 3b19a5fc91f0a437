"""The model's own first layers draft: at a fixed exit, or at the one that has paid best of late.

Both need a model that was taught to exit early, and no part beside it: a published LayerSkip checkpoint, or any model
with the change that `decodax train layer_skip` made (`decodax.load(..., adapter=FOLDER)`). They are lossless: their
tokens are those of plain decoding with that same model.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from decodax.arguments import shown
from decodax.decoding.drafters.del_choice import DynamicExit
from decodax.decoding.drafters.early_layers import EarlyLayers
from decodax.decoding.exit_choice import best_exit
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

FIXED_TOKENS, DYNAMIC_TOKENS = 6, 12


class LayerSkip(Strategy):
    """A fixed exit layer and draft length. By default those that pay best for the agreement that the adapter measured
    when it was trained; without an adapter a quarter of the layers, and FIXED_TOKENS tokens.

    LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710.
    """

    trained_part = EarlyLayers.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        wanted = _number("layer_skip", draft, draft_tokens)
        if lm.adapter is None:
            exit_layer, tokens = max(1, lm.config.num_layers // 4), FIXED_TOKENS
        else:
            agreement = np.asarray(lm.adapter.measured("exit_agreement"))
            shortest, longest = (1, FIXED_TOKENS) if wanted is None else (max(1, wanted),) * 2
            exit_layer, tokens = map(int, best_exit(agreement, lm.config.num_layers, longest, shortest))
        return Speculation(EarlyLayers(lm.model, exit_layer, tokens if wanted is None else wanted), ExactMatch())


class Del(Strategy):
    """The exit layer and the draft length, up to `draft_tokens`, are chosen in every round.

    DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598.
    """

    trained_part = DynamicExit.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        wanted = _number("del", draft, draft_tokens)
        return Speculation(DynamicExit(lm.model, DYNAMIC_TOKENS if wanted is None else wanted), ExactMatch())


def _number(name: str, draft: Any, draft_tokens: int | str | None) -> int | None:
    """The number of tokens asked for, if any; ValueError for what these strategies do not take."""
    if draft is not None:
        raise ValueError(
            f"{name} drafts with the model's own layers, got draft={shown(draft)}: leave it out. What `decodax train "
            "layer_skip` made is merged when the model is loaded: decodax.load(..., adapter=FOLDER)"
        )
    if isinstance(draft_tokens, str):
        raise ValueError(f"{name} does not choose by this machine's times (draft_tokens='auto'): give it a number")
    return draft_tokens
