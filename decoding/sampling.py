"""From the logits of the next token to the token: the pipeline of processors a user asked for, and the draw at its end.

`Sampling` is what the options say; `choose` takes the token; `processed` is the law it is taken from, exactly; and
`token_logprob` is how probable the model itself found a token, before any option. All in float32, whatever the model's
dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from decodax.decoding.logits_processors import METHODS, History, LogitsProcessor
from decodax.decoding.logits_processors._largest import largest_token
from decodax.decoding.logits_processors._options import Option
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
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.layers import pytree

# At temperature 0 one token holds all the probability, so none of these changes anything.
_SHAPE_THE_DRAW = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})


@pytree.dataclass
class Sampling:
    """The active processors, in the order of `METHODS`, and whether any row draws (temperature above 0).

    A pytree: pass it to a jitted function as an argument. Other values of the same options do not recompile; switching
    an option on or off does, as does going from all rows greedy to some row drawing.
    """

    processors: tuple[LogitsProcessor, ...]
    draws: bool = pytree.static()

    @property
    def needs_counts(self) -> bool:
        """Whether `History` must hold the counts of tokens."""
        return any(processor.needs_counts for processor in self.processors)

    @classmethod
    def create(
        cls,
        batch_size: int,
        vocab_size: int,
        *,
        temperature: Option = None,
        top_k: Option = None,
        top_p: Option = None,
        min_p: Option = None,
        typical_p: Option = None,
        repetition_penalty: Option = None,
        presence_penalty: Option = None,
        frequency_penalty: Option = None,
        logit_bias: Option = None,
        min_new_tokens: Option = None,
        end_token_ids: Any = (),
    ) -> "Sampling":
        """Every option is one number, or one per row; None, for all rows or one of them, is not given: greedy, or off.

        An option off for every row leaves no trace in the compiled code; neither do the options that only shape the
        draw (top_k, top_p, min_p, typical_p) where every row is greedy. `end_token_ids` are what `min_new_tokens`
        forbids. Raises ValueError for a value that has no meaning, and where a row would have no token left.
        """
        rows = {"batch_size": batch_size}
        vocabulary = {"vocab_size": vocab_size}
        created: dict[str, LogitsProcessor | None] = {
            "repetition_penalty": RepetitionPenalty.create(repetition_penalty, **rows),
            "presence_penalty": PresencePenalty.create(presence_penalty, **rows),
            "frequency_penalty": FrequencyPenalty.create(frequency_penalty, **rows),
            "logit_bias": LogitBias.create(logit_bias, **rows, **vocabulary),
            "min_new_tokens": MinNewTokens.create(min_new_tokens, end_token_ids=end_token_ids, **rows, **vocabulary),
            "temperature": Temperature.create(temperature, **rows),
            "top_k": TopK.create(top_k, **rows, **vocabulary),
            "top_p": TopP.create(top_p, **rows),
            "min_p": MinP.create(min_p, **rows),
            "typical_p": TypicalP.create(typical_p, **rows),
        }
        _check_some_token_is_left(created["logit_bias"], created["min_new_tokens"], batch_size, vocab_size)
        scaled = created["temperature"]
        draws = not isinstance(scaled, Temperature) or bool((np.asarray(scaled.temperature) > 0).any())
        in_order = (created[name] for name in METHODS if draws or name not in _SHAPE_THE_DRAW)
        return cls(tuple(processor for processor in in_order if processor is not None), draws)


def _check_some_token_is_left(
    logit_bias: LogitsProcessor | None, min_new_tokens: LogitsProcessor | None, batch_size: int, vocab_size: int
) -> None:
    """Raises ValueError where biases of -inf and end tokens not yet allowed forbid a row's whole vocabulary."""
    if logit_bias is None and min_new_tokens is None:
        return
    forbidden = np.zeros((batch_size, vocab_size + 1), bool)  # one more for the padding of LogitBias
    if isinstance(logit_bias, LogitBias):
        row, entry = np.nonzero(np.isneginf(np.asarray(logit_bias.bias)))
        forbidden[row, np.asarray(logit_bias.tokens)[row, entry]] = True
    if isinstance(min_new_tokens, MinNewTokens):
        is_bounded = np.asarray(min_new_tokens.min_new_tokens) > 0
        forbidden[np.ix_(is_bounded, np.asarray(min_new_tokens.end_tokens))] = True
    empty = np.nonzero(forbidden[:, :vocab_size].all(axis=1))[0]
    if empty.size:
        raise ValueError(
            f"logit_bias and min_new_tokens must leave a token to choose, but forbid all {vocab_size} in row {empty[0]}"
        )


def processed_logits(sampling: Sampling, logits: Float[Array, "B V"], history: History) -> Float32[Array, "B V"]:
    """The logits after every active processor."""
    logits = logits.astype(jnp.float32)
    for processor in sampling.processors:
        with jax.named_scope(type(processor).__name__):
            logits = processor(logits, history)
    return logits


def processed(sampling: Sampling, logits: Float[Array, "B V"], history: History) -> Float32[Array, "B V"]:
    """log-probabilities of the law that `choose` takes its token from; -inf for a token that cannot come.

    A greedy row has all its probability on one token.
    """
    logits = processed_logits(sampling, logits, history)
    if sampling.draws:
        return jax.nn.log_softmax(logits, axis=1)
    is_best = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == largest_token(logits)[:, None]
    return jnp.where(is_best, 0.0, -jnp.inf)


def choose(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    history: History,
    seed: UInt32[Array, "B"],
    position: Int32[Array, "B"],
) -> Int32[Array, "B"]:
    """The next token of each row, which will stand at the absolute `position` (the number of tokens before it).

    A row at temperature 0 takes the token of the largest processed logit, the lowest id among equals, whatever its
    neighbours do; the others draw, by adding Gumbel noise of their seed and position and taking the largest.
    """
    logits = processed_logits(sampling, logits, history)
    if sampling.draws:
        logits = logits + gumbel(draw_keys(seed, position, Draw.TOKEN), logits.shape[1:])
    return largest_token(logits)


def token_logprob(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float32[Array, "*rows"]:
    """log-probability of the token under the model's own law: give the logits before any processor."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
