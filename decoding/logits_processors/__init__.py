"""Logits processors change the logits of the next token before it is chosen; one per file, in order.

`decodax.decoding.sampling.Sampling.create` makes the pipeline from options, which have the names of METHODS. The order
is that of transformers: first what depends on the text so far, then the temperature, then what cuts the tail; each cut
sees the distribution that the one before it left, renormalised.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.decoding.logits_processors.contract import Batch as Batch
    from decodax.decoding.logits_processors.contract import History as History
    from decodax.decoding.logits_processors.contract import LogitsProcessor as LogitsProcessor

METHODS: "Mapping[str, type[LogitsProcessor]]" = Methods(
    __name__,
    {
        "repetition_penalty": "RepetitionPenalty",
        "presence_penalty": "PresencePenalty",
        "frequency_penalty": "FrequencyPenalty",
        "logit_bias": "LogitBias",
        "min_new_tokens": "MinNewTokens",
        "temperature": "Temperature",
        "top_k": "TopK",
        "top_p": "TopP",
        "min_p": "MinP",
        "typical_p": "TypicalP",
    },
)

__getattr__, __dir__ = exports(__name__, dict.fromkeys(("Batch", "History", "LogitsProcessor"), "contract"))
