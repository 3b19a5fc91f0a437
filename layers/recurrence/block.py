"""Computes decays and decayed attention within a block of new tokens and from the state before them.

Token i reads token j decayed by the tokens between them, exp(sum of log_decay_m over the m that i reads and that are
after j), and the state decayed by all tokens that it reads. In a chain it reads the tokens before it; in a draft tree
its ancestors, in any order. So one form serves prefill chunks and trees.

Chunkwise forms: Gated Linear Attention, arXiv 2312.06635. Departs from it: each sum has exactly its own terms. A
difference of two running sums, as in the paper, loses digits when decays are strong and overflows in a division.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentUpdate
from decodax.layers.kv_cache.view import CacheView, committed, staged_tokens


class Past(NamedTuple):
    """What precedes a forward.

    cache: of the committed tokens.
    update: of tokens staged after them, if any.
    position: of the staged tokens.
    """

    cache: RecurrentCache
    update: RecurrentUpdate | None
    position: Int[Array, "B U"] | None

    def reads(self, position: Int[Array, "B T"], mask: Mask) -> tuple[Bool[Array, "B T U"], Int[Array, "B U"]]:
        """Which of the staged and the new tokens each new token reads, and the positions of all those.

        Raises ValueError for a mask with which a token attends to later ones.
        """
        if mask.attends_ahead:
            raise ValueError(
                f"a recurrent layer reads tokens in order, and {type(mask).__name__} lets them attend to later ones: "
                "use another mask, or set its attends_ahead to False if it does not"
            )
        keys = position if self.position is None else jnp.concatenate([self.position, position], axis=1)
        reads = mask.allows(Tokens(position, is_new=True), Tokens(keys, is_new=True))
        return jnp.broadcast_to(reads, (*position.shape, keys.shape[1])), keys

    @property
    def columns(self) -> tuple[Float[Array, "B U columns"], Int[Array, "B U"]] | None:
        """The columns of the staged tokens, with their positions."""
        if self.update is None or self.position is None:
            return None
        assert self.update.columns is not None
        return self.update.columns, self.position

    def is_chain(self, mask: Mask) -> bool:
        """Whether the new tokens are a chain directly after the cache."""
        return self.update is None and mask.span(is_new=True) is not None


def past_of(view: CacheView, empty: RecurrentCache) -> Past:
    """The `Past` of what a layer reads; `empty` is the cache where nothing precedes the tokens.

    Raises ValueError for a cache of another kind.
    """
    update, position = staged_tokens(view) or (None, None)
    cache = committed(view)
    cache = empty if cache is None else cache
    if not isinstance(cache, RecurrentCache):
        raise ValueError(f"a recurrent layer's cache must be a RecurrentCache, got {type(cache)}: use its empty_cache")
    return Past(cache, update, position)


class Decays(NamedTuple):
    """The decay factors for T queries; the last axis is 1, or H where each channel of the keys has its own decay.

    of_token: of U tokens, 0 for those that a query does not read.
    of_state: of the state before them.
    """

    of_token: Float32[Array, "B N T U _"]
    of_state: Float32[Array, "B T N _"]


def decays(
    log_decay: Float32[Array, "B U N _"],
    reads: Bool[Array, "B T U"],
    position: Int[Array, "B U"],
) -> Decays:
    """The decay factors of a block.

    log_decay: finite, at least FORGOTTEN, as -inf times 0 is NaN.
    reads: reads[b, i, j] says that token i reads token j, itself included.
    position: orders the tokens that a token reads.
    """
    terms = jnp.where(reads[:, None, None], jnp.moveaxis(log_decay, 1, 3)[:, :, :, None], 0.0)  # [B, N, _, T, U]
    is_after = (position[:, :, None] > position[:, None, :]).astype(jnp.float32)
    between = jnp.einsum("bncim,bmj->bnijc", terms, is_after, precision=Precision.HIGHEST)
    of_token = jnp.where(reads[:, None, :, :, None], jnp.exp(between), 0.0)
    return Decays(of_token, jnp.exp(jnp.transpose(jnp.sum(terms, axis=4), (0, 3, 1, 2))))


def decays_of_chain(log_decay: Float32[Array, "B T N _"]) -> Decays:
    """The decay factors of a chain of tokens."""
    batch, num_tokens = log_decay.shape[:2]
    place = jnp.arange(num_tokens, dtype=jnp.int32)
    reads = jnp.broadcast_to(place[None, :, None] >= place[None, None, :], (batch, num_tokens, num_tokens))
    return decays(log_decay, reads, jnp.broadcast_to(place[None, :], (batch, num_tokens)))


def scores(
    query: Float[Array, "B T N H"], key: Float[Array, "B U N H"], of_token: Float32[Array, "B N T U _"]
) -> Float32[Array, "B N T U"]:
    """The product of each query with each decayed key."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if of_token.shape[4] == 1:
        return jnp.einsum("binh,bjnh->bnij", query, key, precision=Precision.HIGHEST) * of_token[..., 0]
    query, key = jnp.moveaxis(query, 2, 1), jnp.moveaxis(key, 2, 1)
    return jnp.sum(query[:, :, :, None] * key[:, :, None] * of_token, axis=4)


def from_state(
    query: Float[Array, "B T N H"], of_state: Float32[Array, "B T N _"], state: Float32[Array, "B N H I"]
) -> Float32[Array, "B T N I"]:
    """The product of each query with the decayed state."""
    query = query.astype(jnp.float32) * of_state
    return jnp.einsum("binh,bnhv->binv", query, state, precision=Precision.HIGHEST)


def mixed(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B U N H"],
    value: Float[Array, "B U N I"],
    decay: Decays,
    state: Float32[Array, "B N H I"],
) -> Float32[Array, "B T N I"]:
    """Each query's sum over the tokens that it reads and the state before them.

    query: of T tokens.
    key, value: of U tokens.
    decay: of these tokens and of the state.
    state: before them.
    """
    score = scores(query, key, decay.of_token)
    added = jnp.einsum("bnij,bjnv->binv", score, value.astype(jnp.float32), precision=Precision.HIGHEST)
    return added + from_state(query, decay.of_state, state)


def is_finite(*operands: Float[Array, "B T N _"]) -> Bool[Array, "B T"]:
    """Which tokens have only finite numbers (log decays of -inf must be raised before)."""
    found = [jnp.all(jnp.isfinite(operand), axis=(2, 3)) for operand in operands]
    return jnp.all(jnp.stack(found), axis=0)


def zeroed(nonfinite: Bool[Array, "B T"], *operands: Float[Array, "B T N _"]) -> tuple[Array, ...]:
    """The operands with zeros for non-finite tokens: a token not read has weight 0, and 0 x NaN is NaN.

    Afterwards `propagate_nonfinite` must mark the tokens that do read a non-finite one.
    """
    return tuple(jnp.where(nonfinite[:, :, None, None], jnp.zeros((), x.dtype), x) for x in operands)


def propagate_nonfinite(
    reads_nonfinite: Bool[Array, "B T"], result: Float[Array, "B T N I"]
) -> Float[Array, "B T N I"]:
    """The result, with NaN for tokens that read a non-finite one."""
    return jnp.where(reads_nonfinite[:, :, None, None], jnp.full((), jnp.nan, result.dtype), result)


def nonfinite_before(nonfinite: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """In a chain, which tokens are non-finite or after a non-finite one."""
    return jnp.cumsum(nonfinite, axis=1, dtype=jnp.int32) > 0
