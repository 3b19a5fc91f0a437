"""Drafts with the multi-token prediction (MTP) head of DeepSeek-V3's checkpoints; verifies by rejection sampling."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import folder_name, shown
from decodax.decoding.drafters.mtp_head import MTPHead
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.verifiers.chain_rejection import ChainRejection
from decodax.models.load import find_folder
from decodax.models.mtp_head import load_mtp_head

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class MultiTokenPrediction(DraftingStrategy):
    """A chain of `draft_tokens` drawn from the MTP head; by default 1, for which the head was trained; rejection.

    DeepSeek-V3 Technical Report, arXiv 2412.19437. `draft` is a folder of the same model that holds the head, where the
    model's own does not.
    """

    draft_tokens: int = 1

    auxiliary_weights = MTPHead.auxiliary_weights

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        if draft is not None and not isinstance(draft, str | os.PathLike):
            raise ValueError(f"mtp reads its head from a folder: pass draft=FOLDER or none, got {shown(draft)}")
        drafter = MTPHead(lm.model, self.draft_tokens)
        folder = lm.path if draft is None else find_folder(folder_name("draft", draft))
        weights = load_mtp_head(folder, lm.model, dtype=lm.dtype)
        return Speculation(drafter, ChainRejection(), weights)
