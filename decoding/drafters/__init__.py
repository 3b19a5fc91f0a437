"""Lists the drafters: methods that propose draft tokens, one per file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.decoding.drafters.contract import Children as Children
    from decodax.decoding.drafters.contract import Drafter as Drafter
    from decodax.decoding.drafters.contract import Outcome as Outcome
    from decodax.decoding.drafters.contract import Proposal as Proposal
    from decodax.decoding.drafters.contract import fixed_proposal as fixed_proposal
    from decodax.decoding.drafters.del_choice import DynamicExit as DynamicExit
    from decodax.decoding.drafters.draft_model import DraftModel as DraftModel
    from decodax.decoding.drafters.early_layers import EarlyLayers as EarlyLayers
    from decodax.decoding.drafters.hints import Hints as Hints
    from decodax.decoding.drafters.kangaroo import Kangaroo as Kangaroo
    from decodax.decoding.drafters.medusa_heads import MedusaHeads as MedusaHeads
    from decodax.decoding.drafters.mtp_head import MTPHead as MTPHead
    from decodax.decoding.drafters.nested import NestedDraft as NestedDraft
    from decodax.decoding.drafters.no_draft import NoDraft as NoDraft
    from decodax.decoding.drafters.prompt_lookup import PromptLookup as PromptLookup
    from decodax.decoding.drafters.prompt_tokens import PromptTokens as PromptTokens
    from decodax.decoding.drafters.replay import Recording as Recording
    from decodax.decoding.drafters.replay import Replay as Replay
    from decodax.decoding.drafters.wider_proposals import HintedProposal as HintedProposal
    from decodax.decoding.drafters.wider_proposals import LayerProposal as LayerProposal

_METHODS = Methods(
    __name__,
    {
        "no_draft": "NoDraft",
        "prompt_lookup": "PromptLookup",
        "draft_model": "DraftModel",
        "early_layers": "EarlyLayers",
        "del_choice": "DynamicExit",
        "hints": "Hints",
        "prompt_tokens": "PromptTokens",
        "nested": "NestedDraft",
        "kangaroo": "Kangaroo",
        "medusa_heads": "MedusaHeads",
        "mtp_head": "MTPHead",
        "replay": "Replay",
    },
)
METHODS: "Mapping[str, type[Drafter]]" = _METHODS

__getattr__, __dir__ = exports(
    __name__,
    _METHODS.exports
    | {
        "Children": "contract",
        "Drafter": "contract",
        "Outcome": "contract",
        "Proposal": "contract",
        "fixed_proposal": "contract",
        "HintedProposal": "wider_proposals",
        "LayerProposal": "wider_proposals",
        "Recording": "replay",
    },
)
