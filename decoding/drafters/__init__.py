"""Ways to guess the next tokens, one per file."""

from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters.del_choice import DynamicExit
from decodax.decoding.drafters.draft_model import DraftModel
from decodax.decoding.drafters.early_layers import EarlyLayers
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.drafters.kangaroo import Kangaroo
from decodax.decoding.drafters.medusa_heads import MedusaHeads
from decodax.decoding.drafters.nested import NestedDraft
from decodax.decoding.drafters.next_layer import NextTokenLayer
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.drafters.prompt_lookup import PromptLookup
from decodax.decoding.drafters.prompt_tokens import PromptTokens
from decodax.decoding.drafters.replay import Recording, Replay

METHODS: dict[str, type[Drafter]] = {
    "no_draft": NoDraft,
    "prompt_lookup": PromptLookup,
    "draft_model": DraftModel,
    "early_layers": EarlyLayers,
    "del_choice": DynamicExit,
    "hints": Hints,
    "prompt_tokens": PromptTokens,
    "nested": NestedDraft,
    "kangaroo": Kangaroo,
    "medusa_heads": MedusaHeads,
    "next_layer": NextTokenLayer,
    "replay": Replay,
}

__all__ = [
    "METHODS",
    "Children",
    "DraftModel",
    "Drafter",
    "DynamicExit",
    "EarlyLayers",
    "Hints",
    "Kangaroo",
    "MedusaHeads",
    "NestedDraft",
    "NextTokenLayer",
    "NoDraft",
    "Outcome",
    "PromptLookup",
    "PromptTokens",
    "Proposal",
    "Recording",
    "Replay",
    "fixed_proposal",
]
