"""Decodes without a draft; layer gates choose on the prompt which layers a text skips (FiRST)."""

from typing import TYPE_CHECKING, Any

from decodax.core.arguments import shown
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.early_exit.routed_layers import RoutedLayers
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


class RoutedLayersStrategy(Strategy):
    """Layer gates decide once per text; with a LoRA adapter trained for the remaining layers, or without.

    FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513.
    """

    lossless = False
    auxiliary_weights = RoutedLayers.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(f"first drafts nothing: leave out draft_tokens, got {shown(draft_tokens)}")
        auxiliary = find_auxiliary_weights("first", lm, draft)
        layer_policy = RoutedLayers(*(auxiliary.shape[name] for name in ("threshold", "kept_first", "kept_last")))
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), auxiliary.params.get("low_rank", {})))
        params |= {"layer_gates": auxiliary.params["layer_gates"]}
        return Speculation(NoDraft(), ExactMatch(), layer_policy=layer_policy, params=params)
