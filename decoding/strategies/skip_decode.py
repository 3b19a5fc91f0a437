"""Decodes without a draft; later tokens run fewer layers, with a LoRA adapter trained for it (SkipDecode)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import whole_number
from decodax.decoding.auxiliary_check import naming_settings
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.strategies.contract import Speculation, Strategy
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True)
class SkipDecodeStrategy(Strategy):
    """The number of layers falls to its minimum over `decay_tokens` new tokens; training sees slopes of all kinds.

    SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, arXiv 2307.02628.
    """

    decay_tokens: int = 128

    lossless = False
    auxiliary_weights = SkipDecode.auxiliary_weights

    def __post_init__(self) -> None:
        whole_number("decay_tokens", self.decay_tokens, least=1)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation:
        auxiliary = find_auxiliary_weights("skip_decode", lm, draft)
        shape = auxiliary.shape
        most = shape.get("max_layers") or lm.config.num_layers
        with naming_settings(auxiliary.label):
            layer_policy = SkipDecode(most, shape["min_layers"], self.decay_tokens, shape["warmup"])
        params = lm.model.stacked(merged(lm.model.unstacked(lm.params), auxiliary.params["low_rank"]))
        return Speculation(NoDraft(), ExactMatch(), layer_policy=layer_policy, params=params)
