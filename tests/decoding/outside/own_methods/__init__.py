"""Methods from outside decodax, one per contract, each in a file of its own; they import only its public modules."""

from .first_layers import FirstLayers
from .last_successor import LastSuccessor
from .last_token_penalty import LastTokenPenalty
from .quantised_cache import Int8Cache
from .token_shift import ShiftCache, TokenShift
from .top_tokens import AmongTopTokens

# As decodax's own folders list theirs; decodax itself never looks here.
METHODS = {
    "kv_cache": {"int8": Int8Cache, "shift": ShiftCache},
    "mixers": {"token_shift": TokenShift},
    "drafters": {"last_successor": LastSuccessor},
    "verifiers": {"among_top_tokens": AmongTopTokens},
    "early_exit": {"first_layers": FirstLayers},
    "logits_processors": {"last_token_penalty": LastTokenPenalty},
}
