"""Lists the verifiers: rules that decide which draft tokens are accepted, one per file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.decoding.node_random import NodeRandom as NodeRandom
    from decodax.decoding.verifiers.chain_rejection import ChainRejection as ChainRejection
    from decodax.decoding.verifiers.contract import Verdict as Verdict
    from decodax.decoding.verifiers.contract import Verifier as Verifier
    from decodax.decoding.verifiers.contract import at_node as at_node
    from decodax.decoding.verifiers.contract import follow_argmax as follow_argmax
    from decodax.decoding.verifiers.contract import follow_tokens as follow_tokens
    from decodax.decoding.verifiers.deterministic_tree import DeterministicTree as DeterministicTree
    from decodax.decoding.verifiers.exact_match import ExactMatch as ExactMatch
    from decodax.decoding.verifiers.tree_rejection import TreeRejection as TreeRejection
    from decodax.decoding.verifiers.tree_rejection_without_replacement import (
        TreeRejectionWithoutReplacement as TreeRejectionWithoutReplacement,
    )
    from decodax.decoding.verifiers.typical_acceptance import TypicalAcceptance as TypicalAcceptance

_METHODS = Methods(
    __name__,
    {
        "exact_match": "ExactMatch",
        "chain_rejection": "ChainRejection",
        "tree_rejection": "TreeRejection",
        "tree_rejection_without_replacement": "TreeRejectionWithoutReplacement",
        "deterministic_tree": "DeterministicTree",
        "typical_acceptance": "TypicalAcceptance",
    },
)
METHODS: "Mapping[str, type[Verifier]]" = _METHODS

_CONTRACT = ("NodeRandom", "Verdict", "Verifier", "at_node", "follow_argmax", "follow_tokens")
__getattr__, __dir__ = exports(__name__, _METHODS.exports | dict.fromkeys(_CONTRACT, "contract"))
