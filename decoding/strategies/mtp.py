"""Multi-token prediction: the layer behind the last in DeepSeek-V3's checkpoints drafts the next token."""

import os
from typing import TYPE_CHECKING, Any

import jax

from decodax.arguments import folder_name, shown
from decodax.decoding.drafters.next_layer import NextTokenLayer
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.verifiers.chain_rejection import ChainRejection
from decodax.models.load import find_folder
from decodax.models.next_layer import load_next_layer

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DRAFT_TOKENS = 1


class MultiTokenPrediction(Strategy):
    """A chain of `draft_tokens`, by default the one that the layer was trained for, drawn from its law; rejection.

    DeepSeek-V3 Technical Report, arXiv 2412.19437. `draft` is a folder of the same model that holds the layer, where
    the model's own does not.
    """

    trained_part = NextTokenLayer.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if isinstance(draft_tokens, str):
            raise ValueError("mtp cannot choose the length of its drafts: give draft_tokens a number")
        if draft is not None and not isinstance(draft, str | os.PathLike):
            raise ValueError(f"mtp reads its layer from a folder: pass draft=FOLDER or none, got {shown(draft)}")
        drafter = NextTokenLayer(lm.model, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
        folder = lm.path if draft is None else find_folder(folder_name("draft", draft))
        weights = load_next_layer(folder, lm.model, dtype=jax.tree.leaves(lm.params)[0].dtype)
        return Speculation(drafter, ChainRejection(), weights)
