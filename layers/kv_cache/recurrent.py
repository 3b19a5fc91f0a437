"""The cache of a layer that keeps no tokens: a state per head of fixed size, which every token decays and adds to.

    state after a token = exp(log_decay) * state + key^T value

Gated linear attention, lightning attention and the gated delta rule all have this form (for the last one, `value` is
what the layer has corrected already). A layer reads the state and hands back its tokens' rows; `commit` folds the
accepted ones into the state afterwards. Rejected tokens therefore never enter it, and rolling back a draft means
doing nothing: no snapshot of the state is kept for any node of a tree. What was committed cannot be taken out again.

The state is float32 whatever the model computes in: it sums up all tokens, and rounded, it stops growing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.layers import pytree
from decodax.layers.attention.predecessors import tail_after


@pytree.dataclass
class RecurrentRows:
    """What the tokens of one forward will add to a state, and not yet have.

    log_decay: one per head or one per channel of the keys, at most 0. columns: what the layer's short causal
    convolution reads of each token, None without one. `kept[b, t]` false marks a token for which this layer did not
    run: its row is garbage, and it changes nothing.
    """

    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N I"]
    log_decay: Float32[Array, "B T N H"] | Float32[Array, "B T N 1"]
    columns: Float[Array, "B T columns"] | None = None
    kept: Bool[Array, "B T"] | None = None

    def place(self, new: "RecurrentRows", slot: Int[Array, " T"]) -> "RecurrentRows":
        """These rows with `new` ones at the given slots; a slot beyond them is dropped.

        Raises ValueError for rows that mark tokens as not kept: layers read every staged row that the mask allows.
        """
        if new.kept is not None:
            raise ValueError("rows marked by `kept` cannot be staged: stage only layers that ran for every token")

        def write(rows: Array, fresh: Array) -> Array:
            return rows.at[:, slot].set(fresh.astype(rows.dtype), mode="drop")

        return jax.tree.map(write, self, new)


@pytree.dataclass
class RecurrentCache:
    """The state of B rows after `length` tokens, and the columns of their last W - 1 tokens (`predecessors.py`).

    `capacity` is the number of tokens asked for when the cache was made; the state itself has no limit.
    """

    state: Float32[Array, "B N H I"]
    tail: Float[Array, "B W_minus_1 columns"] | None
    length: Int[Array, " B"]
    capacity: int = pytree.static()

    @property
    def marks_tokens(self) -> bool:
        return True  # a token not kept changes no state, so there is nothing to mark

    @classmethod
    def empty(
        cls,
        batch_size: int,
        state_shape: tuple[int, int, int],
        capacity: int,
        dtype: DTypeLike,
        tail_shape: tuple[int, int] | None = None,
    ) -> "RecurrentCache":
        """A cache that has seen nothing. state_shape: (N, H, I). tail_shape: (W - 1, columns), held in `dtype`."""
        tail = None if tail_shape is None else jnp.zeros((batch_size, *tail_shape), dtype)
        state = jnp.zeros((batch_size, *state_shape), jnp.float32)
        return cls(state, tail, jnp.zeros(batch_size, jnp.int32), capacity)

    def empty_rows(self, num_tokens: int, dtype: DTypeLike, *, per_channel: bool) -> RecurrentRows:
        """Room for rows that are to be staged; per_channel: they have a decay for each channel of the keys."""
        batch, heads, key_size, value_size = self.state.shape
        tokens = (batch, num_tokens, heads)
        columns = None if self.tail is None else jnp.zeros((batch, num_tokens, self.tail.shape[2]), dtype)
        return RecurrentRows(
            jnp.zeros((*tokens, key_size), dtype),
            jnp.zeros((*tokens, value_size), dtype),
            jnp.zeros((*tokens, key_size if per_channel else 1), jnp.float32),
            columns,
        )

    def commit(
        self, rows: RecurrentRows, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "RecurrentCache":
        """The state after `count[b]` more tokens: a forward's first ones, or those listed in `path[b]`.

        A token's weight is exp of the log decays after it, from a sum of exactly those. What the other tokens hold
        does not matter, be it NaN; a row that takes none keeps its state: times 1, plus 0.
        """
        length = self.length + count
        if rows.kept is not None:
            count, path = _kept_of(rows.kept, count, path)
        tail = self.tail
        if tail is not None:
            assert rows.columns is not None
            tail = tail_after(tail, rows.columns, count, path)
        key, value, log_decay = rows.key, rows.value, rows.log_decay
        if path is not None:
            place = path[:, :, None, None]
            key, value, log_decay = (jnp.take_along_axis(tokens, place, axis=1) for tokens in (key, value, log_decay))
        is_taken = (jnp.arange(key.shape[1], dtype=count.dtype)[None, :] < count[:, None])[:, :, None, None]
        log_decay = jnp.where(is_taken, log_decay, 0.0)
        from_here = jax.lax.cumsum(log_decay, axis=1, reverse=True)
        after = jnp.concatenate([from_here[:, 1:], jnp.zeros_like(from_here[:, :1])], axis=1)
        key = jnp.where(is_taken, key.astype(jnp.float32), 0.0) * jnp.exp(after)
        value = jnp.where(is_taken, value.astype(jnp.float32), 0.0)
        added = jnp.einsum("btnh,btni->bnhi", key, value, precision=Precision.HIGHEST)
        state = self.state * jnp.exp(from_here[:, 0])[..., None] + added
        return dataclasses.replace(self, state=state, tail=tail, length=length)


def _kept_of(
    kept: Bool[Array, "B T"], count: Int[Array, " B"], path: Int[Array, "B A"] | None
) -> tuple[Int[Array, " B"], Int[Array, "B A"]]:
    """Count and path of those accepted tokens that are kept, in their order."""
    if path is None:
        path = jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=count.dtype)[None, :], kept.shape)
    is_accepted = jnp.arange(path.shape[1], dtype=count.dtype)[None, :] < count[:, None]
    is_taken = is_accepted & jnp.take_along_axis(kept, path, axis=1)
    order = jnp.argsort(~is_taken, axis=1, stable=True)
    return jnp.sum(is_taken, axis=1, dtype=count.dtype), jnp.take_along_axis(path, order, axis=1)
