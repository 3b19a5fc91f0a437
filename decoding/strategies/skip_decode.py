"""SkipDecode by name: plain decoding in which later tokens run fewer layers, with the change trained for it."""

from typing import TYPE_CHECKING, Any

from decodax.arguments import shown
from decodax.decoding.depth.skip_decode import SkipDecode
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.part_check import naming_settings
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.trained_part import find_part
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DECAY_TOKENS = 128  # new tokens until the fewest layers are reached; training sees slopes of all kinds


class SkipDecodeStrategy(Strategy):
    """The layers fall to their minimum over 128 new tokens; for another slope build the `Speculation` by hand.

    SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, arXiv 2307.02628.
    """

    lossless = False
    trained_part = SkipDecode.trained_part

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(f"skip_decode drafts nothing: leave out draft_tokens, got {shown(draft_tokens)}")
        part = find_part("skip_decode", lm, draft)
        shape = part.shape
        most = shape.get("max_layers") or lm.config.num_layers
        with naming_settings(part.label):
            depth = SkipDecode(most, shape["min_layers"], DECAY_TOKENS, shape["warmup"])
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), part.params["low_rank"]))
        return Speculation(NoDraft(), ExactMatch(), depth=depth, params=params)
