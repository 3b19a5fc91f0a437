"""A block of new tokens that read each other and a state before them: how much of everything is left for each reader.

Token i finds token j decayed by the tokens between them, exp(sum of log_decay_m over the m that i reads and that stand
behind j), and the state decayed by all that it reads. In a chain those are the neighbours to the left; in a tree (of
draft tokens) they are the ancestors, in whatever order these lie. So one form serves chunks of a prompt and trees.

Chunkwise forms: Gated Linear Attention, arXiv 2312.06635. Departs from it: each sum is taken of exactly its terms. A
difference of two running sums, as in the paper, loses digits when decays are strong and overflows where it is divided.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.layers.attention.attend_invariant import Tile
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentRows
from decodax.layers.kv_cache.staged import Staged


class Past(NamedTuple):
    """What precedes a forward: a cache, and the rows of tokens staged behind it with their positions, if any."""

    cache: RecurrentCache
    rows: RecurrentRows | None
    position: Int[Array, "B U"] | None

    def reads(self, position: Int[Array, "B T"], mask: Mask) -> tuple[Bool[Array, "B T U"], Int[Array, "B U"]]:
        """Which of the staged and the new tokens each new one reads, and where all those stand."""
        keys = position if self.position is None else jnp.concatenate([self.position, position], axis=1)
        reads = mask.allows(Tokens(position, is_new=True), Tokens(keys, is_new=True))
        return jnp.broadcast_to(reads, (*position.shape, keys.shape[1])), keys

    @property
    def columns(self) -> tuple[Float[Array, "B U columns"], Int[Array, "B U"]] | None:
        """Of the staged tokens, with their positions."""
        if self.rows is None or self.position is None:
            return None
        assert self.rows.columns is not None
        return self.rows.columns, self.position

    def is_chain(self, mask: Mask) -> bool:
        """Whether the new tokens stand one behind the other, right behind the cache."""
        return self.rows is None and mask.span(is_new=True) is not None


def past_of(cache: Any, empty: RecurrentCache) -> Past:
    """The parts of what a layer is given as its cache (or `Staged`); `empty` where nothing precedes the tokens.

    Raises ValueError for a cache of another kind.
    """
    rows = position = None
    if isinstance(cache, Staged):
        cache, rows, position = cache.cache, cache.rows, cache.position
    cache = empty if cache is None else cache
    if isinstance(cache, Tile):
        raise ValueError("a model with recurrent layers cannot run in the invariant mode: use invariant=False")
    if not isinstance(cache, RecurrentCache):
        raise ValueError(f"a recurrent layer needs a RecurrentCache, as its empty_cache makes; got {type(cache)}")
    return Past(cache, rows, position)


class Decays(NamedTuple):
    """What is left for T readers: of U tokens (0 of those they do not read), and of the state before them.

    The last axis is 1, or H where each channel of the keys decays by itself.
    """

    of_token: Float32[Array, "B N T U _"]
    of_state: Float32[Array, "B T N _"]


def decays(
    log_decay: Float32[Array, "B U N _"],
    reads: Bool[Array, "B T U"],
    position: Int[Array, "B U"],
) -> Decays:
    """`reads[b, i, j]`: token i reads token j, itself included; `position` orders what a token reads.

    log_decay: finite, at least FORGOTTEN, as -inf times 0 is NaN.
    """
    terms = jnp.where(reads[:, None, None], jnp.moveaxis(log_decay, 1, 3)[:, :, :, None], 0.0)  # [B, N, _, T, U]
    stands_behind = (position[:, :, None] > position[:, None, :]).astype(jnp.float32)
    between = jnp.einsum("bncim,bmj->bnijc", terms, stands_behind, precision=Precision.HIGHEST)
    of_token = jnp.where(reads[:, None, :, :, None], jnp.exp(between), 0.0)
    return Decays(of_token, jnp.exp(jnp.transpose(jnp.sum(terms, axis=4), (0, 3, 1, 2))))


def decays_of_chain(log_decay: Float32[Array, "B T N _"]) -> Decays:
    """Those of tokens that stand one behind the other."""
    batch, num_tokens = log_decay.shape[:2]
    place = jnp.arange(num_tokens, dtype=jnp.int32)
    reads = jnp.broadcast_to(place[None, :, None] >= place[None, None, :], (batch, num_tokens, num_tokens))
    return decays(log_decay, reads, jnp.broadcast_to(place[None, :], (batch, num_tokens)))


def scores(
    query: Float[Array, "B T N H"], key: Float[Array, "B U N H"], of_token: Float32[Array, "B N T U _"]
) -> Float32[Array, "B N T U"]:
    """The product of each query with each key, as far as the key is left for it."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if of_token.shape[4] == 1:
        return jnp.einsum("binh,bjnh->bnij", query, key, precision=Precision.HIGHEST) * of_token[..., 0]
    query, key = jnp.moveaxis(query, 2, 1), jnp.moveaxis(key, 2, 1)
    return jnp.sum(query[:, :, :, None] * key[:, :, None] * of_token, axis=4)


def from_state(
    query: Float[Array, "B T N H"], of_state: Float32[Array, "B T N _"], state: Float32[Array, "B N H I"]
) -> Float32[Array, "B T N I"]:
    """What each query finds in the state, as far as that is left for it."""
    query = query.astype(jnp.float32) * of_state
    return jnp.einsum("binh,bnhv->binv", query, state, precision=Precision.HIGHEST)


def mixed(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U N H"],
    value: Float[Array, "B U N I"],
    left: Decays,
    state: Float32[Array, "B N H I"],
) -> Float32[Array, "B T N I"]:
    """Each query's sum over the tokens that it reads and the state before them."""
    score = scores(query, key, left.of_token)
    added = jnp.einsum("bnij,bjnv->binv", score, value.astype(jnp.float32), precision=Precision.HIGHEST)
    return added + from_state(query, left.of_state, state)


def is_sound(*operands: Float[Array, "B T N _"]) -> Bool[Array, "B T"]:
    """Tokens all of whose numbers are finite (log decays of -inf have to be raised before)."""
    found = [jnp.all(jnp.isfinite(operand), axis=(2, 3)) for operand in operands]
    return jnp.all(jnp.stack(found), axis=0)


def without(broken: Bool[Array, "B T"], *operands: Float[Array, "B T N _"]) -> tuple[Array, ...]:
    """The operands with zeros for broken tokens: a token not read has weight 0, and 0 x NaN is NaN.

    Who does read a broken token has to be `spoilt` afterwards.
    """
    return tuple(jnp.where(broken[:, :, None, None], jnp.zeros((), x.dtype), x) for x in operands)


def spoilt(reads_broken: Bool[Array, "B T"], result: Float[Array, "B T N I"]) -> Float[Array, "B T N I"]:
    """The result, NaN for tokens that read a broken one."""
    return jnp.where(reads_broken[:, :, None, None], jnp.full((), jnp.nan, result.dtype), result)


def broken_before(broken: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """In a chain, which tokens are broken or stand behind one that is."""
    return jnp.cumsum(broken, axis=1, dtype=jnp.int32) > 0
