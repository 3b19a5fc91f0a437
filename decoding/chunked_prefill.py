"""Prefills the KV caches: runs the prompts through the model in chunks, up to the last token of each row.

    state = prefill(model, params, tokens, length, max_new_tokens, seed)

The first step of decoding runs the last token of a row. A function runs each chunk, so a model, its first layers with
an adapter, and a stack with skipped layers are prefilled in the same way. Drafters prefill their own caches with
`prefill_caches`, inside a compiled function.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from decodax.core.arguments import whole_number
from decodax.core.axes import declared_axes
from decodax.decoding.early_exit.contract import LayerPolicy
from decodax.decoding.logits_processors import History
from decodax.decoding.programs import bounded_jit
from decodax.decoding.sampling import Sampling
from decodax.decoding.sizes import cache_capacity, check_cache_fits, chunk_tokens
from decodax.decoding.state import DecodeState, HostOrDevice, empty_state
from decodax.layers.kv_cache.contract import CachePolicy, MarksTokens
from decodax.layers.kv_cache.full import KVCache
from decodax.models.model import Model, Params, commit

MAX_CHUNK_TOKENS = 512  # prompt tokens per forward and device, so that cache updates stay small
DRAFT_CHUNK_TOKENS = 128  # prompt tokens that a drafter runs per forward


@runtime_checkable
class PrefillForward(Protocol):
    """Runs T tokens per row. Gives the updates of `caches`, and vectors that are finite where the layers' inputs were.

    caches: what the tokens attend to; not changed.
    tokens, position: ids and absolute positions.
    row_length: all tokens that each row will have, the last token included.
    """

    def __call__(
        self,
        caches: tuple[Any, ...],
        tokens: Int[Array, "B T"],
        position: Int[Array, "B T"],
        row_length: Int[Array, "B 1"],
    ) -> tuple[tuple[Any, ...], Float[Array, "B T D"]]: ...


def prefill(
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
    layer_policy: LayerPolicy | None = None,
    capacity: int | None = None,
) -> DecodeState:
    """The state after running the prompts: row b's prompt is `tokens[b, :length[b]]`, the rest of the row is padding.

    The prompt runs in chunks of bucketed size, each committed to the cache. Buffers are bucketed too, so prompts of
    similar length share compiled code.

    max_new_tokens: for all rows, or for each.
    seed: one per row.
    sampling: greedy by default.
    stop_token_ids: end a row after they are emitted.
    cache_dtype: the parameters' by default.
    cache_policy: what the caches keep; by default what `layer_policy` needs. It must mark tokens where that does.
    layer_policy: which layers the prompts run, all by default (`decoding/early_exit/`).
    capacity: tokens that each row has room for, such as those of a state that these rows join (`put_rows`); by default
        what the longest row needs. It is rounded up to a bucket.

    In a jitted function, prompts, lengths and seeds may be traced: then the sizes are those of the longest prompt that
    `tokens` has room for, `max_new_tokens` is one number, and values cannot be checked.

    Raises ValueError for an empty row, token ids outside the vocabulary, shapes that do not match, and rows that would
    be longer than the model's context. Raises ValueError for a cache policy that the model's layers, or the layer
    policy, cannot use. Raises ValueError for a capacity below what the longest row needs.
    Raises MemoryError when the cache would not fit on the device.
    """
    is_traced = any(isinstance(given, Tracer) for given in (tokens, length, max_new_tokens, seed))
    numpy: Any = jnp if is_traced else np
    tokens, length = numpy.asarray(tokens), numpy.asarray(length, np.int32)
    limit = length + numpy.asarray(max_new_tokens, np.int32)
    if is_traced:
        most_new = whole_number("max_new_tokens", max_new_tokens, least=1, otherwise=", where prompts are traced")
        longest, most = tokens.shape[1], tokens.shape[1] + most_new
        _check_prompt(model, np.zeros(tokens.shape), np.full(length.shape, longest), np.full(length.shape, most))
    else:
        _check_prompt(model, tokens, length, limit)
        longest, most = int(length.max()), int(limit.max())
    if capacity is not None and capacity < most:
        raise ValueError(f"capacity must be at least {most} (tokens of the longest row at its end), got {capacity}")
    batch, capacity = tokens.shape[0], cache_capacity(most if capacity is None else capacity, model.execution)
    dtype = cache_dtype or model.dtype(params)
    policy = _cache_policy(model, cache_policy, layer_policy)
    check_cache_fits(model, batch, capacity, dtype, policy)
    sampling = Sampling.create(batch, model.config.vocab_size) if sampling is None else sampling
    width = min(tokens.shape[1], capacity)
    prompt = numpy.where(np.arange(width)[None, :] < length[:, None], tokens[:, :width], 0).astype(np.int32)
    padded = numpy.pad(prompt, ((0, 0), (0, capacity - width)))
    stops = np.broadcast_to(np.asarray(stop_token_ids, np.int32), (batch, len(stop_token_ids)))
    state = empty_state(
        model,
        dtype,
        padded,
        length,
        limit,
        numpy.asarray(seed, np.uint32),
        stops,
        sampling,
        policy,
    )
    if layer_policy is not None:
        layer_policy.check(model, params)
        state = dataclasses.replace(
            state, layer_policy=model.execution.replicated(layer_policy.start(model, params, batch))
        )
    # Not the policy itself: policies that prefill in the same way share the compiled code.
    policy_of_prompts = None if layer_policy is None else layer_policy.prefill_policy
    start, filled = 0, _without_options(state)
    while start < longest - 1:  # the first step of decoding runs the last token
        chunk = chunk_tokens(longest - 1 - start, MAX_CHUNK_TOKENS, model.execution)
        filled = prefill_chunk(model, policy_of_prompts, chunk, params, filled, start)
        start += chunk
    history = dataclasses.replace(state.history, num_new_tokens=filled.history.num_new_tokens)
    return dataclasses.replace(filled, history=history, sampling=state.sampling)


def _cache_policy(model: Model, given: CachePolicy | None, layer_policy: LayerPolicy | None) -> CachePolicy:
    """What is given, or else what the layer policy needs; ValueError where the one cannot stand for the other."""
    needed = KVCache if layer_policy is None else layer_policy.cache_policy
    if given is None or needed is KVCache:
        return needed if given is None else given
    caches = jax.eval_shape(lambda: model.empty_cache(1, 1, jnp.float32, given))
    if not all(isinstance(cache, MarksTokens) and cache.marks_tokens for cache in caches):
        raise ValueError(
            f"{type(layer_policy).__name__} skips layers for some tokens and needs caches that mark them "
            f"(`MarksTokens`), got cache_policy {getattr(given, '__name__', type(given).__name__)}: leave it out"
        )
    return given


def _without_options(state: DecodeState) -> DecodeState:
    """The state without the sampling options, so that one program prefills all prompts of one shape."""
    history = History(None, None, state.history.num_new_tokens)
    return dataclasses.replace(state, history=history, sampling=Sampling((), False))


def _check_prompt(model: Model, tokens: HostOrDevice, length: HostOrDevice, limit: HostOrDevice) -> None:
    """Raises ValueError with the row and what to do when a prompt cannot be run."""
    if tokens.ndim != 2 or length.shape != tokens.shape[:1]:
        raise ValueError(f"tokens must be [B, T] and length [B], got shapes {tokens.shape} and {length.shape}")
    if limit.shape != length.shape or np.any(limit <= length):
        raise ValueError(f"max_new_tokens must be at least 1, for all rows or for each, got {limit - length}")
    context = model.config.max_position_embeddings
    for row, (ids, count) in enumerate(zip(tokens, length, strict=True)):
        if not 1 <= count <= tokens.shape[1]:
            raise ValueError(f"length must be in 1..{tokens.shape[1]} (tokens of the row), got {count} in row {row}")
        if limit[row] > context:
            raise ValueError(
                f"a prompt and its new tokens must fit in the model's context of {context}, got {count} + "
                f"{limit[row] - count} tokens in row {row}: lower max_new_tokens or shorten the prompt"
            )
        outside = ids[:count][(ids[:count] < 0) | (ids[:count] >= model.config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token ids must be in 0..{model.config.vocab_size - 1} (the vocabulary), got {outside[0]} in row {row}"
            )


@bounded_jit(static_argnums=(0, 1, 2), donate_argnums=(4,))
def prefill_chunk(
    model: Model,
    layer_policy: LayerPolicy | None,
    chunk: int,
    params: Params,
    state: DecodeState,
    start: Int[Array, ""] | int,
) -> DecodeState:
    """Runs prompt tokens start .. start + chunk - 1 of every row and commits those before the row's last token.

    layer_policy: decides which layers run; None for all. The state is donated.
    """
    if layer_policy is None:
        state = prefill_state(all_layers(model, params), state, start, chunk)
    else:
        state = layer_policy.prefill_chunk(model, params, state, start, chunk)
    return model.execution.constrained(state)


def prefill_state(run: PrefillForward, state: DecodeState, start: Int[Array, ""] | int, chunk: int) -> DecodeState:
    """The state after `run` prefilled a chunk of every prompt; rows with NaN or infinite values have failed."""
    caches, finite = commit_chunk(run, state.caches, state.tokens, state.length, start, chunk, skip=state.failed)
    return dataclasses.replace(
        state,
        caches=caches,
        failed=state.failed | ~finite,
        done=state.done | ~finite,
        num_target_forwards=state.num_target_forwards + 1,
    )


def all_layers(model: Model, params: Params) -> PrefillForward:
    """Runs all layers. Finite check: the last layer's input, as its output is not needed; with stages, the output."""
    last = model.config.num_layers - (1 if model.stages is None else 0)

    def run(caches, tokens, position, row_length):
        out = model.apply(params, tokens, position, caches, row_length=row_length, capture=(last,))
        return out.cache_updates, out.captured[last]

    return run


def is_prefilled(length: Int[Array, " B"], start: Int[Array, ""] | int, chunk: int) -> Bool[Array, "B T"]:
    """Which of the tokens start .. start + chunk - 1 belong to a row's prompt and are not its last one."""
    return start + jnp.arange(chunk, dtype=jnp.int32)[None, :] < length[:, None] - 1


def commit_chunk(
    run: PrefillForward,
    caches: tuple[Any, ...],
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    start: Int[Array, ""] | int,
    chunk: int,
    *,
    skip: Bool[Array, " B"],
) -> tuple[tuple[Any, ...], Bool[Array, " B"]]:
    """The caches after tokens start .. start + chunk - 1 of every row, and which rows are finite.

    Tokens before a row's last one are committed; nothing is written for rows that are not finite.

    run: the forward.
    tokens, length: every row's buffer, and how much of it is filled.
    skip: rows for which nothing is written.
    """
    window, position = chunk_of(tokens, start, chunk)
    updates, finite_check = run(caches, window, position, jnp.maximum(length[:, None], 1))
    return commit_finite(caches, updates, finite_check, length, start, skip=skip)


def chunk_of(
    tokens: Int[Array, "B S"], start: Int[Array, ""] | int, chunk: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Tokens start .. start + chunk - 1 of every row, and their positions."""
    offset = start + jnp.arange(chunk, dtype=jnp.int32)
    # A chunk may reach past the buffer; those columns repeat the last token and are not committed.
    window = jnp.take(tokens, jnp.minimum(offset, tokens.shape[1] - 1), axis=1)
    return window, jnp.broadcast_to(offset, window.shape)


def commit_finite(
    caches: tuple[Any, ...],
    updates: tuple[Any, ...],
    finite_check: Float[Array, "B T D"],
    length: Int[Array, " B"],
    start: Int[Array, ""] | int,
    *,
    skip: Bool[Array, " B"],
) -> tuple[tuple[Any, ...], Bool[Array, " B"]]:
    """The caches after a chunk that begins at `start` has run, and which rows are finite; as `commit_chunk`.

    updates, finite_check: what the forward gave.
    """
    is_new = is_prefilled(length, start, finite_check.shape[1])
    finite = jnp.all(jnp.isfinite(finite_check) | ~is_new[..., None], axis=(1, 2))
    # A value that is not finite in a cache shows in the layers after it. The last layer has none.
    finite = finite & _rows_are_finite(updates[-1], is_new)
    # The count depends on the forward, so XLA writes the caches in place (see KVCache.commit).
    count = jnp.where(finite & ~skip, jnp.sum(is_new, axis=1, dtype=jnp.int32), 0)
    return commit(caches, updates, count), finite


def _rows_are_finite(update: Any, counted: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    """Which rows have no NaN or infinity in what a layer's cache would keep of the counted tokens."""
    finite, kept = jnp.ones(counted.shape[0], bool), getattr(update, "kept", None)
    counted = counted if kept is None else counted & kept
    for leaf, axes in zip(jax.tree.leaves(update), declared_axes(update), strict=True):
        if axes is not None and {"B", "T"} <= set(axes) and jnp.issubdtype(leaf.dtype, jnp.floating):
            others = tuple(axis for axis, name in enumerate(axes) if name not in "BT")
            of_token = jnp.all(jnp.isfinite(leaf), axis=others)  # [B, T]: no class has them the other way round
            finite = finite & jnp.all(of_token | ~counted, axis=1)
    return finite


def prefill_caches(
    run: PrefillForward,
    caches: tuple[Any, ...],
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    *,
    skip: Bool[Array, " B"],
) -> tuple[Any, ...]:
    """The caches after prefilling all of every row but its last token, inside a compiled function: a drafter's start.

    One loop over chunks of DRAFT_CHUNK_TOKENS, as many as the longest row needs.

    run: the forward.
    tokens, length: every row's buffer, and how much of it is filled.
    skip: rows for which nothing is written.
    """
    chunk = min(DRAFT_CHUNK_TOKENS, tokens.shape[1])

    def prefill_one(index: Array, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return commit_chunk(run, caches, tokens, length, index * chunk, chunk, skip=skip)[0]

    num_chunks = (jnp.max(length) - 1 + chunk - 1) // chunk
    return jax.lax.fori_loop(0, num_chunks, prefill_one, caches)
