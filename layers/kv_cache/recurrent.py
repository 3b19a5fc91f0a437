"""Implements the cache of a recurrent layer: a state per head of fixed size, which every token decays and adds to.

    state after a token = exp(log_decay) * state + key^T value

Gated linear attention, lightning attention and the gated delta rule all have this form (for the last one, `value` is
the corrected value). A layer reads the state and returns its tokens' cache update; `commit` adds the accepted ones to
the state afterwards. Rejected tokens therefore never enter it, and rolling back a draft means doing nothing: no
snapshot of the state is stored for any node of a tree. Committed tokens cannot be removed.

The state is float32 whatever the model's dtype: it sums all tokens, and with rounding it stops growing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.layers.attention.predecessors import tail_after


@pytree.dataclass
class RecurrentUpdate:
    """What the tokens of one forward will add to a state.

    key, value: of these tokens.
    log_decay: one per head or one per channel of the keys, at most 0.
    columns: inputs of the layer's short causal convolution, None without one.
    kept: kept[b, t] is false for a token for which this layer did not run: its entry is garbage, and changes nothing.
    """

    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N I"]
    log_decay: Float32[Array, "B T N H"] | Float32[Array, "B T N 1"]
    columns: Float[Array, "B T columns"] | None = None
    kept: Bool[Array, "B T"] | None = None

    def place(self, new: "RecurrentUpdate", slot: Int[Array, " T"]) -> "RecurrentUpdate":
        """This update with `new` tokens at the given slots; a slot beyond the last is dropped.

        Raises ValueError for an update that marks tokens as not kept: layers read every staged token that the mask
            allows.
        """
        if new.kept is not None:
            raise ValueError("tokens marked by `kept` cannot be staged: stage only layers that ran for every token")

        def write(update: Array, fresh: Array) -> Array:
            return update.at[:, slot].set(fresh.astype(update.dtype), mode="drop")

        return jax.tree.map(write, self, new)


@pytree.dataclass
class RecurrentCache:
    """The state of B rows.

    state: after `length` tokens.
    tail: columns of the last W - 1 tokens (`predecessors.py`), None without a convolution.
    length: tokens committed so far.
    capacity: the number of tokens requested when the cache was made; the state itself has no limit.
    """

    state: Float32[Array, "B N H I"]
    tail: Float[Array, "B W_minus_1 columns"] | None
    length: Int[Array, " B"]
    capacity: int = pytree.static()

    @property
    def marks_tokens(self) -> bool:
        return True  # a token not kept does not change the state, so no mark is needed

    @classmethod
    def empty(
        cls,
        batch_size: int,
        state_shape: tuple[int, int, int],
        capacity: int,
        dtype: DTypeLike,
        tail_shape: tuple[int, int] | None = None,
    ) -> "RecurrentCache":
        """An empty cache.

        batch_size: B.
        state_shape: (N, H, I).
        capacity: tokens of each row.
        dtype: of the tail.
        tail_shape: (W - 1, columns), None without a convolution.
        """
        tail = None if tail_shape is None else jnp.zeros((batch_size, *tail_shape), dtype)
        state = jnp.zeros((batch_size, *state_shape), jnp.float32)
        return cls(state, tail, jnp.zeros(batch_size, jnp.int32), capacity)

    def empty_like(self) -> "RecurrentCache":
        """An empty cache of the same form."""
        return jax.tree.map(jnp.zeros_like, self)

    def empty_update(self, num_tokens: int, dtype: DTypeLike, *, per_channel: bool) -> RecurrentUpdate:
        """An empty update for tokens that will be staged.

        num_tokens: of the update.
        dtype: of keys, values and columns.
        per_channel: there is a decay for each channel of the keys.
        """
        batch, heads, key_size, value_size = self.state.shape
        tokens = (batch, num_tokens, heads)
        columns = None if self.tail is None else jnp.zeros((batch, num_tokens, self.tail.shape[2]), dtype)
        return RecurrentUpdate(
            jnp.zeros((*tokens, key_size), dtype),
            jnp.zeros((*tokens, value_size), dtype),
            jnp.zeros((*tokens, key_size if per_channel else 1), jnp.float32),
            columns,
        )

    def commit(
        self, update: RecurrentUpdate, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "RecurrentCache":
        """The state after `count[b]` more tokens: a forward's first ones, or those in `path[b]`.

        A token's weight is exp of the sum of exactly the log decays after it. The other tokens have no effect, even if
        NaN; a row with count 0 keeps its state: times 1, plus 0.
        """
        length = self.length + count
        if update.kept is not None:
            count, path = _kept_of(update.kept, count, path)
        tail = self.tail
        if tail is not None:
            assert update.columns is not None
            tail = tail_after(tail, update.columns, count, path)
        key, value, log_decay = update.key, update.value, update.log_decay
        if path is not None:
            place = path[:, :, None, None]
            key, value, log_decay = (jnp.take_along_axis(tokens, place, axis=1) for tokens in (key, value, log_decay))
        is_committed = (jnp.arange(key.shape[1], dtype=count.dtype)[None, :] < count[:, None])[:, :, None, None]
        log_decay = jnp.where(is_committed, log_decay, 0.0)
        from_here = jax.lax.cumsum(log_decay, axis=1, reverse=True)
        after = jnp.concatenate([from_here[:, 1:], jnp.zeros_like(from_here[:, :1])], axis=1)
        key = jnp.where(is_committed, key.astype(jnp.float32), 0.0) * jnp.exp(after)
        value = jnp.where(is_committed, value.astype(jnp.float32), 0.0)
        added = jnp.einsum("btnh,btni->bnhi", key, value, precision=Precision.HIGHEST)
        state = self.state * jnp.exp(from_here[:, 0])[..., None] + added
        return dataclasses.replace(self, state=state, tail=tail, length=length)


def _kept_of(
    kept: Bool[Array, "B T"], count: Int[Array, " B"], path: Int[Array, "B A"] | None
) -> tuple[Int[Array, " B"], Int[Array, "B A"]]:
    """Count and path of the accepted tokens that are kept, in their order."""
    if path is None:
        path = jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=count.dtype)[None, :], kept.shape)
    is_accepted = jnp.arange(path.shape[1], dtype=count.dtype)[None, :] < count[:, None]
    is_committed = is_accepted & jnp.take_along_axis(kept, path, axis=1)
    order = jnp.argsort(~is_committed, axis=1, stable=True)
    return jnp.sum(is_committed, axis=1, dtype=count.dtype), jnp.take_along_axis(path, order, axis=1)
