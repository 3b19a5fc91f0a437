"""Lists the named decoding strategies, each a drafter with a verifier and their auxiliary weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.decoding.strategies.contract import DraftingStrategy as DraftingStrategy
    from decodax.decoding.strategies.contract import Speculation as Speculation
    from decodax.decoding.strategies.contract import Strategy as Strategy
    from decodax.decoding.strategies.draft_model import DraftModelChain as DraftModelChain
    from decodax.decoding.strategies.draft_model import DraftModelSampledTree as DraftModelSampledTree
    from decodax.decoding.strategies.draft_model import DraftModelTree as DraftModelTree
    from decodax.decoding.strategies.draft_ppd import PromptedDraft as PromptedDraft
    from decodax.decoding.strategies.first import RoutedLayersStrategy as RoutedLayersStrategy
    from decodax.decoding.strategies.kangaroo import KangarooDraft as KangarooDraft
    from decodax.decoding.strategies.medusa import MedusaTree as MedusaTree
    from decodax.decoding.strategies.mtp import MultiTokenPrediction as MultiTokenPrediction
    from decodax.decoding.strategies.ppd import ParallelPrompt as ParallelPrompt
    from decodax.decoding.strategies.prompt_lookup import PromptLookupChain as PromptLookupChain
    from decodax.decoding.strategies.self_speculation import Del as Del
    from decodax.decoding.strategies.self_speculation import LayerSkip as LayerSkip
    from decodax.decoding.strategies.skip_decode import SkipDecodeStrategy as SkipDecodeStrategy
    from decodax.decoding.strategies.specee import SpeculativeExitAlone as SpeculativeExitAlone
    from decodax.decoding.strategies.specee import SpeculativeExitTree as SpeculativeExitTree

_METHODS = Methods(
    __name__,
    {
        "autoregressive": "decodax.decoding.autoregressive:autoregressive",
        "prompt_lookup": "PromptLookupChain",
        "draft_model": "DraftModelChain",
        "draft_tree": "draft_model:DraftModelTree",
        "draft_sampled_tree": "draft_model:DraftModelSampledTree",
        "layer_skip": "self_speculation:LayerSkip",
        "del": "self_speculation:Del",
        "specee": "SpeculativeExitAlone",
        "specee_tree": "specee:SpeculativeExitTree",
        "ppd": "ParallelPrompt",
        "draft_ppd": "PromptedDraft",
        "medusa": "MedusaTree",
        "skip_decode": "SkipDecodeStrategy",
        "first": "RoutedLayersStrategy",
        "kangaroo": "KangarooDraft",
        "mtp": "MultiTokenPrediction",
    },
)
METHODS: Mapping[str, Any] = _METHODS

_CONTRACT = ("DraftingStrategy", "Speculation", "Strategy")
__getattr__, __dir__ = exports(__name__, _METHODS.exports | dict.fromkeys(_CONTRACT, "contract"))
