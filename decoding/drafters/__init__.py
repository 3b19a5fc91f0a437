"""Ways to guess the next tokens, one per file."""

from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters.draft_model import DraftModel

METHODS: dict[str, type[Drafter]] = {"draft_model": DraftModel}

__all__ = ["METHODS", "Children", "DraftModel", "Drafter", "Outcome", "Proposal", "fixed_proposal"]
