"""Defines the decoding state: frozen, of fixed shapes, and everything that a loop carries from step to step.

The last token of each row is sampled, but not yet in any cache. So the cache holds `length - 1` tokens, prefill needs
no logits, and every step of every strategy begins by running the model on the last token (and on the draft tokens after
it).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from decodax.core import pytree
from decodax.decoding.draft_counts import DraftCounts
from decodax.decoding.logits_processors import History
from decodax.decoding.programs import bounded_jit
from decodax.decoding.sampling import Sampling
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.write import write_tokens
from decodax.models.model import Model

HostOrDevice = np.ndarray | Array


@pytree.dataclass
class LayerCounts:
    """Runs of single layers of the model in the loop; a layer that one row of a batch needs runs for all.

    batch: for all rows at once.
    row[b]: those that row b needed.
    """

    batch: Int[Array, ""]
    row: Int[Array, " B"]

    @classmethod
    def zero(cls, batch_size: int) -> "LayerCounts":
        return cls(jnp.int32(0), jnp.zeros(batch_size, jnp.int32))

    def add(
        self, batch: Int[Array, ""] | int, row: Int[Array, " #B"] | int, active: Bool[Array, " B"]
    ) -> "LayerCounts":
        """The counts after a forward; rows that are not active, being done, needed nothing."""
        return LayerCounts(self.batch + batch, self.row + jnp.where(active, row, 0))


@pytree.dataclass
class DecodeState:
    """The state of B rows that are being decoded.

    tokens: prompt and output, filled up to `length`.
    logprobs: of the same tokens, zero in the prompt.
    limit: the length at which a row is finished.
    failed: rows whose logits became NaN or infinite: they are `done`, and nothing was written for the step that failed.
    layer_counts: the layers that the loop ran.
    layer_policy: what a layer policy carries from step to step (`decoding/early_exit/`): one array for all rows, or a
        class whose arrays declare their axes.
    draft: what a drafter carries from round to round; None until a strategy that drafts has started.
    counts: of its draft tokens, proposed and accepted; None until then.
    started_by: the kind and the sizes of the drafter whose state `draft` is.
    """

    tokens: Int[Array, "B room"]
    logprobs: Float[Array, "B room"]
    length: Int[Array, " B"]
    limit: Int[Array, " B"]
    done: Bool[Array, " B"]
    failed: Bool[Array, " B"]
    seed: UInt32[Array, " B"]
    stop_token_ids: Int[Array, "B I"]
    caches: tuple[Any, ...]
    history: History
    sampling: Sampling
    num_target_forwards: Int[Array, ""]
    layer_counts: LayerCounts
    layer_policy: Shaped[Array, "B I"] | Any = ()
    draft: Any = None
    counts: DraftCounts | None = None
    started_by: str | None = pytree.static(default=None)

    def last_token(self) -> Int[Array, " B"]:
        """The last token of each row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]

    def append(
        self, token: Int[Array, "B A"], logprob: Float[Array, "B A"], count: Int[Array, " B"]
    ) -> tuple["DecodeState", Int[Array, " B"]]:
        """Adds the first `count` tokens to each row, up to a stop token or the row's limit, after which it is done.

        Gives the new state and the number of tokens added to each row (0 where it was done).
        """
        offset = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
        is_stop = jnp.any(token[:, :, None] == self.stop_token_ids[:, None, :], axis=2)
        up_to_stop = jnp.min(jnp.where(is_stop, offset + 1, token.shape[1]), axis=1)
        emitted = jnp.minimum(jnp.minimum(count, up_to_stop), self.limit - self.length)
        emitted = jnp.where(self.done, 0, emitted)
        slot = jnp.where(offset < emitted[:, None], self.length[:, None] + offset, self.tokens.shape[1])
        stopped = jnp.any(is_stop & (offset == emitted[:, None] - 1), axis=1)
        length = self.length + emitted
        state = dataclasses.replace(
            self,
            tokens=write_tokens(self.tokens, token, slot, axis=1),
            logprobs=write_tokens(self.logprobs, logprob, slot, axis=1),
            length=length,
            done=self.done | stopped | (length >= self.limit),
            history=self.history.record(token, emitted),
        )
        return state, emitted


@bounded_jit(static_argnums=(0, 1, 8))
def empty_state(
    model: Model,
    dtype: DTypeLike,
    tokens: Int[Array, "B room"],
    length: Int[Array, " B"],
    limit: Int[Array, " B"],
    seed: UInt32[Array, " B"],
    stop_token_ids: Int[Array, "B I"],
    sampling: Sampling,
    cache_policy: CachePolicy = KVCache,
) -> DecodeState:
    """The state of rows whose prompts are in `tokens`, filled up to `length`, with empty caches, sharded for the mesh.

    dtype: of the caches.
    limit: the length at which each row is finished.
    seed: one per row.
    stop_token_ids: end a row after they are emitted.
    cache_policy: what the caches keep.
    """
    batch, capacity = tokens.shape
    history = History.start(
        tokens,
        length,
        vocab_size=model.config.vocab_size,
        with_counts=sampling.needs_counts,
        with_tokens=sampling.needs_tokens,
    )
    no = jnp.zeros(batch, bool)
    state = DecodeState(
        tokens=tokens,
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        length=length,
        limit=limit,
        done=no,
        failed=jnp.zeros(batch, bool),
        seed=seed,
        stop_token_ids=stop_token_ids,
        caches=model.empty_cache(batch, capacity, dtype, cache_policy),
        history=history,
        sampling=sampling,
        num_target_forwards=jnp.int32(0),
        layer_counts=LayerCounts.zero(batch),
    )
    return model.execution.constrained(state)
