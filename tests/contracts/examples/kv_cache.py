"""Gives an example of every cache: how it is made, and what of it a layer sees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.recurrent import RecurrentCache
from decodax.layers.kv_cache.tailed import TailedCache, TailedUpdate
from tests.contracts.outside import OUTSIDE

BATCH, DTYPE = 3, jnp.float32


@dataclass(frozen=True)
class CacheExample:
    """A cache and its updates.

    empty: makes an empty cache of this capacity.
    empty_update: makes an update of so many tokens.
    slots: the part of a cache that attention reads slot by slot; None if there is none.
    read_as: by definition, the keys and values [tokens, K, H] that it reads of a row's tokens.
    held: the arrays of a cache that a layer reads as they are.
    held_after: by definition, what they are for a row with these tokens, in float64.

    A row's tokens are the arrays of an update, without the axis of the rows and with that of the tokens first.
    """

    empty: Callable[[int], Any]
    empty_update: Callable[[int], Any]
    slots: Callable[[Any], Any] | None = None
    read_as: Callable[[Any], tuple[Any, Any]] | None = None
    held: Callable[[Any], tuple[Any, ...]] = lambda cache: ()
    held_after: Callable[[Any], tuple[Any, ...]] = lambda tokens: ()


def _tail(columns, size):
    """The last tokens' columns, after zeros where there are fewer."""
    return np.concatenate([np.zeros((size, columns.shape[1])), columns])[-size:]


def _state(tokens):
    state = np.zeros((*tokens.key.shape[1:], tokens.value.shape[2]))
    for key, value, log_decay in zip(tokens.key, tokens.value, tokens.log_decay.astype(np.float64), strict=True):
        state = state * np.exp(log_decay)[..., None] + key[..., None] * value[:, None].astype(np.float64)
    return state


def full():
    def example(marked):
        return CacheExample(
            lambda capacity: KVCache.empty(BATCH, 2, capacity, 5, DTYPE, track_kept=marked),
            lambda num_tokens: KVUpdate.empty(BATCH, 2, num_tokens, 5, DTYPE),
            slots=lambda cache: cache,
            read_as=lambda tokens: (tokens.key, tokens.value),
        )

    return {"plain": example(False), "marked": example(True)}


def latent():
    def read_as(tokens):
        numbers = np.concatenate([tokens.latent, tokens.rope_key], axis=1)[:, None]
        return numbers, numbers

    def example(marked):
        return CacheExample(
            lambda capacity: LatentCache.empty(BATCH, capacity, 5, 2, DTYPE, track_kept=marked),
            lambda num_tokens: LatentUpdate.empty(BATCH, num_tokens, 5, 2, DTYPE),
            slots=lambda cache: cache,
            read_as=read_as,
        )

    return {"plain": example(False), "marked": example(True)}


def tailed():
    return CacheExample(
        lambda capacity: TailedCache.empty(BATCH, 2, capacity, 5, (4, 7), DTYPE, KVCache),
        lambda num_tokens: TailedUpdate.empty(BATCH, 2, num_tokens, 5, 7, DTYPE),
        slots=lambda cache: cache.kv,
        read_as=lambda tokens: (tokens.kv.key, tokens.kv.value),
        held=lambda cache: (cache.tail,),
        held_after=lambda tokens: (_tail(tokens.columns, 4),),
    )


def recurrent():
    def empty(capacity, tail_shape):
        return RecurrentCache.empty(BATCH, (2, 5, 7), capacity, DTYPE, tail_shape)

    return {
        "a decay per channel": CacheExample(
            lambda capacity: empty(capacity, None),
            lambda num_tokens: empty(0, None).empty_update(num_tokens, DTYPE, per_channel=True),
            held=lambda cache: (cache.state,),
            held_after=lambda tokens: (_state(tokens),),
        ),
        "a decay per head, and a tail": CacheExample(
            lambda capacity: empty(capacity, (4, 11)),
            lambda num_tokens: empty(0, (4, 11)).empty_update(num_tokens, DTYPE, per_channel=False),
            held=lambda cache: (cache.state, cache.tail),
            held_after=lambda tokens: (_state(tokens), _tail(tokens.columns, 4)),
        ),
    }


def int8():
    """Of the largest number of a token and head 127 steps, so that each is within half a step."""

    def read_as(tokens):
        def rounded(numbers):
            scale = np.max(np.abs(numbers), axis=-1, keepdims=True) * np.float32(1 / 127)
            return np.round(numbers / scale) * scale

        return rounded(tokens.key), rounded(tokens.value)

    return CacheExample(
        lambda capacity: OUTSIDE["kv_cache"]["int8"].empty(BATCH, 2, capacity, 5, DTYPE),
        lambda num_tokens: KVUpdate.empty(BATCH, 2, num_tokens, 5, DTYPE),
        slots=lambda cache: cache,
        read_as=read_as,
    )


def shift():
    return CacheExample(
        lambda capacity: OUTSIDE["kv_cache"]["shift"].empty(BATCH, capacity, 7, DTYPE),
        lambda num_tokens: OUTSIDE["mixers"]["token_shift"](7).empty_update(BATCH, num_tokens, DTYPE),
        held=lambda cache: (cache.tail,),
        held_after=lambda tokens: (_tail(tokens.features, 1),),
    )
