"""The state of a decoding run: frozen, of fixed shapes, and all that a loop carries from step to step.

The last token of each row is pending: known, but not yet in any cache. So the cache holds `length - 1` tokens, prefill
needs no logits, and every step of every strategy begins alike, with the model run on the pending token (and on drafts
after it).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from decodax.decoding.draft_counts import DraftCounts
from decodax.decoding.logits_processors import History
from decodax.decoding.programs import bounded_jit
from decodax.decoding.prompt_reading import PromptRun, all_layers, read_chunk
from decodax.decoding.sampling import Sampling
from decodax.decoding.sizes import cache_capacity, check_cache_fits, chunk_tokens
from decodax.layers import pytree
from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.write import write_tokens
from decodax.models.model import Model, Params

HostOrDevice = np.ndarray | Array

MAX_CHUNK_TOKENS = 512  # prompt tokens per forward and device, so that rows waiting for their commit stay small


@pytree.dataclass
class LayerCounts:
    """Runs of single layers of the model in the loop. batch: for all rows at once. row[b]: those that row b asked for.

    A layer that some row of a batch asks for is run for all.
    """

    batch: Int[Array, ""]
    row: Int[Array, " B"]

    @classmethod
    def zero(cls, batch_size: int) -> "LayerCounts":
        return cls(jnp.int32(0), jnp.zeros(batch_size, jnp.int32))

    def add(
        self, batch: Int[Array, ""] | int, row: Int[Array, " #B"] | int, took_part: Bool[Array, " B"]
    ) -> "LayerCounts":
        """After a forward; rows that took no part, being done, asked for nothing."""
        return LayerCounts(self.batch + batch, self.row + jnp.where(took_part, row, 0))


@pytree.dataclass
class DecodeState:
    """Everything about B rows that are being continued; `tokens` holds prompt and output, filled up to `length`.

    `limit` is the length at which a row is finished. `failed` marks rows whose logits became NaN or infinite: they are
    `done`, and nothing was written for the step that failed. `logprobs` stands beside `tokens`, zero in the prompt.
    `depth` is what a depth that varies carries (`decoding/depth`), and `layer_counts` the layers that the loop ran.
    `draft` is whatever a drafter carries from round to round, and `counts` what its drafts came to; both are None until
    a strategy that drafts has started.
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
    depth: Any = ()
    draft: Any = None
    counts: DraftCounts | None = None

    def pending(self) -> Int[Array, " B"]:
        """The last token of each row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]

    def append(
        self, token: Int[Array, "B A"], logprob: Float[Array, "B A"], count: Int[Array, " B"]
    ) -> tuple["DecodeState", Int[Array, " B"]]:
        """Adds the first `count` tokens to each row, up to a stop token or the row's limit, after which it is done.

        Gives the new state and how many tokens each row took (none where it was done). A row of `count` 0 gets none.
        """
        offset = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
        is_stop = jnp.any(token[:, :, None] == self.stop_token_ids[:, None, :], axis=2)
        up_to_stop = jnp.min(jnp.where(is_stop, offset + 1, token.shape[1]), axis=1)
        taken = jnp.minimum(jnp.minimum(count, up_to_stop), self.limit - self.length)
        taken = jnp.where(self.done, 0, taken)
        slot = jnp.where(offset < taken[:, None], self.length[:, None] + offset, self.tokens.shape[1])
        stopped = jnp.any(is_stop & (offset == taken[:, None] - 1), axis=1)
        length = self.length + taken
        state = dataclasses.replace(
            self,
            tokens=write_tokens(self.tokens, token, slot, axis=1),
            logprobs=write_tokens(self.logprobs, logprob, slot, axis=1),
            length=length,
            done=self.done | stopped | (length >= self.limit),
            history=self.history.record(token, taken),
        )
        return state, taken


@runtime_checkable
class PromptReader(Protocol):
    """A depth that leaves out layers of prompts, too."""

    def read_prompt(self, model: Model, params: Params, state: Any, start: Int[Array, ""], chunk: int) -> Any: ...


@runtime_checkable
class StartingDepth(Protocol):
    """What beginning a run asks of a depth (`decoding/depth/_contract.py`)."""

    @property
    def cache_policy(self) -> CachePolicy: ...

    @property
    def prompt_reader(self) -> PromptReader | None: ...

    def check(self, model: Model, params: Params) -> None: ...

    def start(self, model: Model, params: Params, batch_size: int) -> Any: ...


def init(
    model: Model,
    params: Params,
    tokens: Int[HostOrDevice, "B T"],
    length: Int[HostOrDevice, " B"],
    max_new_tokens: int | Int[HostOrDevice, " B"],
    seed: Integer[HostOrDevice, " B"],
    *,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] = (),
    cache_dtype: DTypeLike | None = None,
    cache_policy: CachePolicy | None = None,
    depth: StartingDepth | None = None,
) -> DecodeState:
    """The state after reading the prompts: row b's prompt is `tokens[b, :length[b]]`, the rest of the row is padding.

    The prompt is run in chunks of bucketed size, each committed to the cache, and buffers are bucketed too, so prompts
    of similar length share compiled code. `sampling` is greedy by default; `stop_token_ids` end a row after they are
    emitted; the cache has the parameters' dtype unless told otherwise, and keeps what `cache_policy` keeps, by default
    what `depth` needs. `depth` says which layers read the prompts, all by default (`decoding/depth`).

    Raises ValueError for an empty row, token ids outside the vocabulary or shapes that do not match, MemoryError when
    the cache would not fit on the device.
    """
    tokens, length = np.asarray(tokens), np.asarray(length, np.int32)
    limit = length + np.asarray(max_new_tokens, np.int32)
    _check_prompt(model, tokens, length, limit)
    batch, longest = tokens.shape[0], int(length.max())
    capacity = cache_capacity(int(limit.max()), model.execution)
    dtype = cache_dtype or jax.tree.leaves(params)[0].dtype
    policy = cache_policy or (KVCache if depth is None else depth.cache_policy)
    check_cache_fits(model, batch, capacity, dtype, policy)
    sampling = Sampling.create(batch, model.config.vocab_size) if sampling is None else sampling
    width = min(tokens.shape[1], capacity)
    padded = np.zeros((batch, capacity), np.int32)
    padded[:, :width] = np.where(np.arange(width) < length[:, None], tokens[:, :width], 0)
    stops = np.broadcast_to(np.asarray(stop_token_ids, np.int32), (batch, len(stop_token_ids)))
    state = _empty_state(
        model,
        dtype,
        padded,
        length,
        limit,
        np.asarray(seed, np.uint32),
        stops,
        sampling,
        policy,
    )
    if depth is not None:
        depth.check(model, params)
        state = dataclasses.replace(state, depth=model.execution.joined(depth.start(model, params, batch)))
    # Not the depth itself: those that read prompts alike share the compiled code.
    reader = None if depth is None else depth.prompt_reader
    start, reading = 0, _without_options(state)
    while start < longest - 1:  # the last token stays pending
        chunk = chunk_tokens(longest - 1 - start, MAX_CHUNK_TOKENS, model.execution)
        reading = _prefill_chunk(model, reader, chunk, params, reading, start)
        start += chunk
    history = dataclasses.replace(state.history, num_new_tokens=reading.history.num_new_tokens)
    return dataclasses.replace(reading, history=history, sampling=state.sampling)


def _without_options(state: DecodeState) -> DecodeState:
    """What the prompt needs of a state: whatever the options of sampling, one program reads prompts of one shape."""
    history = History(None, None, state.history.num_new_tokens)
    return dataclasses.replace(state, history=history, sampling=Sampling((), False))


def _check_prompt(model: Model, tokens: np.ndarray, length: np.ndarray, limit: np.ndarray) -> None:
    """Raises ValueError with the row and what to do when a prompt cannot be run."""
    if tokens.ndim != 2 or length.shape != tokens.shape[:1]:
        raise ValueError(f"tokens must be [B, T] and length [B], got shapes {tokens.shape} and {length.shape}")
    if limit.shape != length.shape or np.any(limit <= length):
        raise ValueError(f"max_new_tokens must be at least 1, for all rows or for each, got {limit - length}")
    for row, (ids, count) in enumerate(zip(tokens, length, strict=True)):
        if not 1 <= count <= tokens.shape[1]:
            raise ValueError(f"length must be in 1..{tokens.shape[1]} (tokens of the row), got {count} in row {row}")
        outside = ids[:count][(ids[:count] < 0) | (ids[:count] >= model.config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token ids must be in 0..{model.config.vocab_size - 1} (the vocabulary), got {outside[0]} in row {row}"
            )


@bounded_jit(static_argnums=(0, 1, 8))
def _empty_state(
    model, dtype, tokens, length, limit, seed, stop_token_ids, sampling, cache_policy=KVCache
) -> DecodeState:
    batch, capacity = tokens.shape
    history = History.start(tokens, length, vocab_size=model.config.vocab_size, with_counts=sampling.needs_counts)
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
    return model.execution.laid_out(state)


@bounded_jit(static_argnums=(0, 1, 2), donate_argnums=(4,))
def _prefill_chunk(
    model: Model, reader: PromptReader | None, chunk: int, params: Params, state: DecodeState, start: Int[Array, ""]
) -> DecodeState:
    """Runs prompt tokens start .. start + chunk - 1 of every row and commits those before the row's last token."""
    read = read_prompt if reader is None else reader.read_prompt
    return model.execution.laid_out(read(model, params, state, start, chunk))


def read_prompt(model: Model, params: Params, state: DecodeState, start: Int[Array, ""], chunk: int) -> DecodeState:
    """The state after a chunk of every prompt, run through all layers."""
    return read_prompt_by(all_layers(model, params), state, start, chunk)


def read_prompt_by(run: PromptRun, state: DecodeState, start: Int[Array, ""], chunk: int) -> DecodeState:
    """The state after `run` has read a chunk of every prompt; rows that are not sound have failed."""
    caches, sound = read_chunk(run, state.caches, state.tokens, state.length, start, chunk, skip=state.failed)
    return dataclasses.replace(
        state,
        caches=caches,
        failed=state.failed | ~sound,
        done=state.done | ~sound,
        num_target_forwards=state.num_target_forwards + 1,
    )
