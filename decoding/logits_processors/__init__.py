"""Ways to change the law of the next token before it is drawn, one per file, in the order in which they are applied.

`decodax.decoding.sampling.Sampling.create` builds the pipeline from options. The order is that of transformers: first
what depends on the text so far, then the temperature, then what cuts the tail; each cut sees the law the one before it
left, renormalised.
"""

from decodax.decoding.logits_processors._contract import History, LogitsProcessor
from decodax.decoding.logits_processors.frequency_penalty import FrequencyPenalty
from decodax.decoding.logits_processors.logit_bias import LogitBias
from decodax.decoding.logits_processors.min_new_tokens import MinNewTokens
from decodax.decoding.logits_processors.min_p import MinP
from decodax.decoding.logits_processors.presence_penalty import PresencePenalty
from decodax.decoding.logits_processors.repetition_penalty import RepetitionPenalty
from decodax.decoding.logits_processors.temperature import Temperature
from decodax.decoding.logits_processors.top_k import TopK
from decodax.decoding.logits_processors.top_p import TopP
from decodax.decoding.logits_processors.typical_p import TypicalP

METHODS: dict[str, type[LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "logit_bias": LogitBias,
    "min_new_tokens": MinNewTokens,
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "typical_p": TypicalP,
}

__all__ = ["METHODS", "History", "LogitsProcessor"]
