"""Ways of decoding by name: which drafter goes with which verifier, and where the trained part comes from."""

from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.strategies._contract import Speculation, Strategy
from decodax.decoding.strategies.draft_model import DraftModelChain, DraftModelSampledTree, DraftModelTree
from decodax.decoding.strategies.prompt_lookup import PromptLookupChain

METHODS = {
    "autoregressive": autoregressive,
    "prompt_lookup": PromptLookupChain,
    "draft_model": DraftModelChain,
    "draft_tree": DraftModelTree,
    "draft_sampled_tree": DraftModelSampledTree,
}

__all__ = ["METHODS", "Speculation", "Strategy"]
