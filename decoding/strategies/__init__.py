"""Ways of decoding by name: which drafter goes with which verifier, and where the trained part comes from."""

from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.strategies.draft_model import DraftModelChain, DraftModelSampledTree, DraftModelTree
from decodax.decoding.strategies.draft_ppd import PromptedDraft
from decodax.decoding.strategies.first import RoutedLayersStrategy
from decodax.decoding.strategies.kangaroo import KangarooDraft
from decodax.decoding.strategies.medusa import MedusaTree
from decodax.decoding.strategies.mtp import MultiTokenPrediction
from decodax.decoding.strategies.ppd import ParallelPrompt
from decodax.decoding.strategies.prompt_lookup import PromptLookupChain
from decodax.decoding.strategies.self_speculation import Del, LayerSkip
from decodax.decoding.strategies.skip_decode import SkipDecodeStrategy
from decodax.decoding.strategies.specee import SpeculativeExitAlone, SpeculativeExitTree

METHODS = {
    "autoregressive": autoregressive,
    "prompt_lookup": PromptLookupChain,
    "draft_model": DraftModelChain,
    "draft_tree": DraftModelTree,
    "draft_sampled_tree": DraftModelSampledTree,
    "layer_skip": LayerSkip,
    "del": Del,
    "specee": SpeculativeExitAlone,
    "specee_tree": SpeculativeExitTree,
    "ppd": ParallelPrompt,
    "draft_ppd": PromptedDraft,
    "medusa": MedusaTree,
    "skip_decode": SkipDecodeStrategy,
    "first": RoutedLayersStrategy,
    "kangaroo": KangarooDraft,
    "mtp": MultiTokenPrediction,
}

__all__ = ["METHODS", "Speculation", "Strategy"]
