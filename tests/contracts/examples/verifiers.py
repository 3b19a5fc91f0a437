"""Gives an example of each verifier."""

from decodax.decoding.verifiers import (
    ChainRejection,
    DeterministicTree,
    ExactMatch,
    TreeRejection,
    TreeRejectionWithoutReplacement,
    TypicalAcceptance,
    Verifier,
)


def exact_match() -> Verifier:
    return ExactMatch()


def chain_rejection() -> Verifier:
    return ChainRejection()


def tree_rejection() -> Verifier:
    return TreeRejection()


def tree_rejection_without_replacement() -> Verifier:
    return TreeRejectionWithoutReplacement()


def deterministic_tree() -> Verifier:
    return DeterministicTree()


def typical_acceptance() -> Verifier:
    return TypicalAcceptance()
