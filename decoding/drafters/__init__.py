"""Ways to guess the next tokens, one per file."""

from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters.draft_model import DraftModel
from decodax.decoding.drafters.no_draft import NoDraft
from decodax.decoding.drafters.prompt_lookup import PromptLookup
from decodax.decoding.drafters.replay import Recording, Replay

METHODS: dict[str, type[Drafter]] = {
    "no_draft": NoDraft,
    "prompt_lookup": PromptLookup,
    "draft_model": DraftModel,
    "replay": Replay,
}

__all__ = [
    "METHODS",
    "Children",
    "DraftModel",
    "Drafter",
    "NoDraft",
    "Outcome",
    "PromptLookup",
    "Proposal",
    "Recording",
    "Replay",
    "fixed_proposal",
]
