"""Decodes with pure, jit-compiled loops over a frozen state, one per strategy."""

if __name__ != "decodax.decoding":
    raise ImportError("decoding is a part of decodax: import decodax.decoding")

from typing import TYPE_CHECKING

from decodax.core.lazy import exports
from decodax.decoding.autoregressive import autoregressive as autoregressive  # late, its file would hide it

if TYPE_CHECKING:
    from decodax.decoding import drafters as drafters
    from decodax.decoding import verifiers as verifiers
    from decodax.decoding.chunked_prefill import prefill as prefill
    from decodax.decoding.chunked_prefill import prefill_chunk as prefill_chunk
    from decodax.decoding.options import GenerateOptions as GenerateOptions
    from decodax.decoding.rows import put_rows as put_rows
    from decodax.decoding.rows import take_rows as take_rows
    from decodax.decoding.sampling import Sampling as Sampling
    from decodax.decoding.speculative_decoding import Speculative as Speculative
    from decodax.decoding.speculative_decoding import speculative as speculative
    from decodax.decoding.state import DecodeState as DecodeState
    from decodax.decoding.state import empty_state as empty_state
    from decodax.decoding.strategies.contract import Speculation as Speculation
    from decodax.decoding.tree import Tree as Tree

__getattr__, __dir__ = exports(
    __name__,
    {
        "DecodeState": "state",
        "GenerateOptions": "options",
        "Sampling": "sampling",
        "Speculation": "strategies.contract",
        "Speculative": "speculative_decoding",
        "Tree": "tree",
        "drafters": "",
        "empty_state": "state",
        "prefill": "chunked_prefill",
        "prefill_chunk": "chunked_prefill",
        "put_rows": "rows",
        "speculative": "speculative_decoding",
        "take_rows": "rows",
        "verifiers": "",
    },
)
