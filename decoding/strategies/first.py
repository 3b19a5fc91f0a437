"""FiRST by name: plain decoding in which each text leaves out the layers that its prompt could do without."""

from typing import TYPE_CHECKING, Any

from decodax.arguments import shown
from decodax.decoding.depth.routed_layers import RoutedLayers
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.trained_part import find_part
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


class RoutedLayersStrategy(Strategy):
    """Routers decide once per text; with the change trained for the layers that remain, or with routers alone.

    FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513.
    """

    lossless = False
    trained_part = RoutedLayers.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(f"first drafts nothing: leave out draft_tokens, got {shown(draft_tokens)}")
        part = find_part("first", lm, draft)
        depth = RoutedLayers(*(part.shape[name] for name in ("threshold", "kept_first", "kept_last")))
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), part.params.get("low_rank", {})))
        params |= {"routers": part.params["routers"]}
        return Speculation(NoDraft(), ExactMatch(), depth=depth, params=params)
