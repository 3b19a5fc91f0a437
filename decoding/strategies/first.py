"""Decodes without a draft; layer gates choose on the prompt which layers a text skips (FiRST)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import share
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.early_exit.routed_layers import RoutedLayers
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class RoutedLayersStrategy(Strategy):
    """Layer gates decide once per text; with a LoRA adapter trained for the remaining layers, or without.

    FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513.

    threshold: of the mean probability to skip, in 0..1; None for that of the layer gates' training.
    """

    threshold: float | None = None

    lossless = False
    auxiliary_weights = RoutedLayers.auxiliary_weights

    def __post_init__(self) -> None:
        if self.threshold is not None:
            share("threshold", self.threshold)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        auxiliary = find_auxiliary_weights("first", lm, draft)
        trained = (auxiliary.shape[name] for name in ("threshold", "kept_first", "kept_last"))
        layer_policy = RoutedLayers(*trained)
        if self.threshold is not None:
            layer_policy = replace(layer_policy, threshold=self.threshold)
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), auxiliary.params.get("low_rank", {})))
        params |= {"layer_gates": auxiliary.params["layer_gates"]}
        return Speculation(NoDraft(), ExactMatch(), layer_policy=layer_policy, params=params)
