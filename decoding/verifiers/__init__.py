"""Rules that decide which draft tokens stand, one per file."""

from decodax.decoding.verifiers._contract import Verdict, Verifier
from decodax.decoding.verifiers.exact_match import ExactMatch

METHODS: dict[str, type[Verifier]] = {"exact_match": ExactMatch}

__all__ = ["METHODS", "ExactMatch", "Verdict", "Verifier"]
