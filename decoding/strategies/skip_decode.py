"""Decodes without a draft; later tokens run fewer layers, with a LoRA adapter trained for it (SkipDecode)."""

from typing import TYPE_CHECKING, Any

from decodax.core.arguments import shown
from decodax.decoding.auxiliary_check import naming_settings
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DECAY_TOKENS = 128  # new tokens until the fewest layers are reached; training sees slopes of all kinds


class SkipDecodeStrategy(Strategy):
    """The layers fall to their minimum over 128 new tokens; for another slope build a `Speculation`.

    SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, arXiv 2307.02628.
    """

    lossless = False
    auxiliary_weights = SkipDecode.auxiliary_weights

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1) -> Speculation:
        if draft_tokens is not None:
            raise ValueError(f"skip_decode drafts nothing: leave out draft_tokens, got {shown(draft_tokens)}")
        auxiliary = find_auxiliary_weights("skip_decode", lm, draft)
        shape = auxiliary.shape
        most = shape.get("max_layers") or lm.config.num_layers
        with naming_settings(auxiliary.label):
            layer_policy = SkipDecode(most, shape["min_layers"], DECAY_TOKENS, shape["warmup"])
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), auxiliary.params["low_rank"]))
        return Speculation(NoDraft(), ExactMatch(), layer_policy=layer_policy, params=params)
