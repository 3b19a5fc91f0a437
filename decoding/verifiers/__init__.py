"""Rules that decide which draft tokens stand, one per file."""

from decodax.decoding.verifiers._contract import Verdict, Verifier
from decodax.decoding.verifiers.chain_rejection import ChainRejection
from decodax.decoding.verifiers.deterministic_tree import DeterministicTree
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.decoding.verifiers.tree_rejection import TreeRejection
from decodax.decoding.verifiers.tree_rejection_without_replacement import TreeRejectionWithoutReplacement
from decodax.decoding.verifiers.typical_acceptance import TypicalAcceptance

METHODS: dict[str, type[Verifier]] = {
    "exact_match": ExactMatch,
    "chain_rejection": ChainRejection,
    "tree_rejection": TreeRejection,
    "tree_rejection_without_replacement": TreeRejectionWithoutReplacement,
    "deterministic_tree": DeterministicTree,
    "typical_acceptance": TypicalAcceptance,
}

__all__ = [
    "METHODS",
    "ChainRejection",
    "DeterministicTree",
    "ExactMatch",
    "TreeRejection",
    "TreeRejectionWithoutReplacement",
    "TypicalAcceptance",
    "Verdict",
    "Verifier",
]
