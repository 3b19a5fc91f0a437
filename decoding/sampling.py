"""From the logits of the next token to the token: the pipeline of processors a user asked for, and the draw at its end.

`Sampling` is what the options say; `choose` takes the token; `processed` is the distribution it is taken from, exactly;
and `token_logprob` is how probable the model itself found a token, before any option. All in float32, whatever the
model's dtype.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from decodax.core import pytree
from decodax.core.arguments import shown
from decodax.decoding.logits_processors import METHODS
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.logits_processors.temperature import Temperature
from decodax.decoding.own_processor import own_processors
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.top_tokens import argmax_token


@pytree.dataclass
class Sampling:
    """The active processors, in the order of `METHODS`, and whether any row is sampled (temperature above 0).

    A pytree: pass it to a jitted function as an argument. Other values of the same options do not recompile; switching
    an option on or off does, as does going from all rows greedy to some row sampled.
    """

    processors: tuple[LogitsProcessor, ...]
    do_sample: bool = pytree.static()

    @property
    def greedy(self) -> "Sampling":
        """The pipeline where every row takes the most probable token: without the processors that shape a draw."""
        return Sampling(tuple(processor for processor in self.processors if not processor.only_sampling), False)

    @property
    def needs_counts(self) -> bool:
        """Whether `History` must hold the counts of tokens."""
        return any(processor.needs_counts for processor in self.processors)

    @property
    def needs_tokens(self) -> bool:
        """Whether `History` must hold the tokens themselves."""
        return any(processor.needs_tokens for processor in self.processors)

    @property
    def has_own(self) -> bool:
        """Whether some processor is the user's own, which may leave a row no token."""
        ours = tuple(METHODS.values())
        return not all(isinstance(processor, ours) for processor in self.processors)

    @classmethod
    def create(
        cls,
        batch_size: int,
        vocab_size: int,
        *,
        end_token_ids: Any = (),
        logits_processors: Any = (),
        **options: Any,
    ) -> "Sampling":
        """The pipeline for options by their names in `METHODS`, each one value, or one per row.

        None, for all rows or one of them, means not given: greedy, or off. An option that is off for every row leaves
        no trace in the compiled code; neither do options that only shape a draw (`only_sampling`) where every row is
        greedy.

        end_token_ids: what `min_new_tokens` forbids.
        logits_processors: one's own, one or several (`own_processor.py`), which run in their order, before the
            temperature.
        Raises TypeError for a name that does not exist.
        Raises ValueError for a value that has no meaning, and where a row would have no token left.
        """
        unknown = next((name for name in options if name not in METHODS), None)
        if unknown is not None:
            raise TypeError(f"sampling has no option {unknown!r}: known are {', '.join(METHODS)}")
        batch = Batch(batch_size, vocab_size, end_token_ids)
        given = {name: option for name, option in options.items() if option is not None}
        given.setdefault("temperature", 0.0)
        created = {name: METHODS[name].create(given[name], batch) for name in METHODS if name in given}
        active = {name: processor for name, processor in created.items() if processor is not None}
        _check_some_token_is_left(active, batch)
        temperature = created["temperature"]
        do_sample = not isinstance(temperature, Temperature) or temperature.samples
        own = list(own_processors(logits_processors))
        place = sum(name in active for name in list(METHODS)[: list(METHODS).index("temperature")])
        ordered = [*active.values()][:place] + own + [*active.values()][place:]
        return cls(tuple(processor for processor in ordered if do_sample or not processor.only_sampling), do_sample)


def _check_some_token_is_left(processors: Mapping[str, LogitsProcessor], batch: Batch) -> None:
    """Raises ValueError where options together forbid a row's whole vocabulary."""
    found = {name: processor.forbidden(batch) for name, processor in processors.items()}
    forbidden = {name: tokens for name, tokens in found.items() if tokens is not None}
    empty = np.nonzero(np.any(list(forbidden.values()), axis=0).all(axis=1))[0] if forbidden else np.zeros(0)
    if empty.size:
        raise ValueError(
            f"{' and '.join(forbidden)} must leave a token to choose, but forbid all {batch.vocab_size} in row "
            f"{empty[0]}"
        )


def processed_logits(sampling: Sampling, logits: Float[Array, "B V"], history: History) -> Float32[Array, "B V"]:
    """The logits after every active processor."""
    logits = logits.astype(jnp.float32)
    for processor in sampling.processors:
        with jax.named_scope(processor.name):
            changed = processor(logits, history)
        if getattr(changed, "shape", None) != logits.shape or changed.dtype != logits.dtype:
            found = f"{changed.dtype} of shape {changed.shape}" if hasattr(changed, "dtype") else shown(changed)
            raise ValueError(
                f"the logits processor {processor.name} must give logits, {logits.dtype} of shape {logits.shape}, got "
                f"{found}"
            )
        logits = changed
    return logits


def processed(sampling: Sampling, logits: Float[Array, "B V"], history: History) -> Float32[Array, "B V"]:
    """log-probabilities of the distribution that `choose` takes its token from; -inf for a token that cannot come.

    A greedy row has all its probability on one token.
    """
    logits = processed_logits(sampling, logits, history)
    if sampling.do_sample:
        return jax.nn.log_softmax(logits, axis=1)
    is_best = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == argmax_token(logits)[:, None]
    return jnp.where(is_best, 0.0, -jnp.inf)


def argmax_and_confidence(
    sampling: Sampling, logits: Float32[Array, "B V"], history: History
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """The most probable token after the sampling options that can change it, and the confidence: its probability.

    The confidence is that without options, so that it means the same in greedy rows and in sampled ones.
    """
    confidence = jnp.exp(jnp.max(logits, axis=1) - jax.nn.logsumexp(logits, axis=1))
    return argmax_token(processed_logits(sampling.greedy, logits, history)), confidence


def has_choice(sampling: Sampling, processed: Float32[Array, "*rows V"]) -> Bool[Array, "*rows"] | bool:
    """Which rows have a token left after the processors, and no NaN; those of this library always leave one."""
    return jnp.isfinite(jnp.max(processed, axis=-1)) if sampling.has_own else True


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
    if sampling.do_sample:
        logits = logits + gumbel(draw_keys(seed, position, Draw.TOKEN), logits.shape[1:])
    return argmax_token(logits)


def token_logprob(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float32[Array, "*rows"]:
    """log-probability of the token under the model's own distribution: give the logits before any processor."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
