"""Chooses the number of draft tokens from measured times of the target and the draft, and the acceptance rate.

A round that drafts C tokens takes C runs of the draft and one forward of the target over C + 1 tokens, and gives
1 + a + ... + a^C tokens if each is accepted with probability a (arXiv 2211.17192, section 3.3). Where no C is faster
than plain decoding, the choice is 0, with the reason.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.sizes import bucket
from decodax.models.model import Model, Params, commit
from decodax.sharding.host import from_first

if TYPE_CHECKING:
    from decodax.decoding.find_draft import Draft
    from decodax.models.load import LanguageModel

LENGTHS = (1, 2, 3, 4, 5, 6, 8)
_REPETITIONS, _CACHED_TOKENS = 7, 128


@dataclass(frozen=True)
class DraftChoice:
    """A chosen draft length.

    num_tokens: to draft per round; 0 where plain decoding is faster.
    speed_up: expected; 1 for none.
    reason: the measured times, as a text.
    """

    num_tokens: int
    speed_up: float
    reason: str


def latency_curve(
    model: Model, params: Params, num_tokens: Sequence[int], *, batch_size: int = 1, cached_tokens: int = _CACHED_TOKENS
) -> dict[int, float]:
    """Median seconds of a forward with logits over N tokens per row after `cached_tokens`, for each N.

    The sizes take turns, so that a drift of the machine's speed affects all alike. Over several processes the first
    one's measurements count, as all must choose alike.

    num_tokens: the values of N.
    batch_size: rows.
    cached_tokens: tokens in the cache of each row.
    """
    capacity = bucket(cached_tokens + max(num_tokens))
    dtype, length = model.dtype(params), jnp.full(batch_size, cached_tokens, jnp.int32)

    @jax.jit
    def filled() -> Any:
        caches = model.empty_cache(batch_size, capacity, dtype)
        return commit(caches, model.empty_update(batch_size, cached_tokens, dtype), length)

    caches = filled()
    seconds = _alternating(forwards(model, params, caches, cached_tokens, num_tokens))
    return dict(zip(seconds, from_first(model.execution.mesh, list(seconds.values())), strict=True))


def forwards(
    model: Model, params: Params, caches: Any, cached_tokens: int, num_tokens: Iterable[int]
) -> dict[int, Callable[[], Any]]:
    """For each N a function that runs a forward over N tokens as the decoding loop does: logits and cache updates.

    caches: with `cached_tokens` tokens in each row.
    num_tokens: the values of N.
    """

    @jax.jit
    def forward(params: Params, tokens: Int[Array, "B T"], caches: Any) -> Any:
        position = cached_tokens + jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out = model.apply(params, tokens, position, caches)
        return model.logits(params, out.hidden), out.cache_updates

    inputs = {size: jnp.zeros((caches[0].length.shape[0], size), jnp.int32) for size in num_tokens}
    return {size: lambda tokens=tokens: forward(params, tokens, caches) for size, tokens in inputs.items()}


def _alternating(calls: dict[int, Callable[[], Any]]) -> dict[int, float]:
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[int, list[float]] = {key: [] for key in calls}
    for _ in range(_REPETITIONS):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def choose_draft_tokens(target_seconds: dict[int, float], draft_seconds: float, acceptance: float) -> DraftChoice:
    """The best draft length among those whose forward (length + 1 tokens) was measured.

    target_seconds: of a forward over N tokens, at least for N = 1.
    draft_seconds: of one run of the draft.
    acceptance: probability that a draft token is accepted.
    Raises ValueError for an acceptance outside 0..1.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance must be a probability in 0..1, got {acceptance}")

    def speed_up(num_tokens: int) -> float:
        tokens = float(sum(acceptance**i for i in range(num_tokens + 1)))
        return tokens * target_seconds[1] / (num_tokens * draft_seconds + target_seconds[num_tokens + 1])

    lengths = [size - 1 for size in target_seconds if size > 1]
    best = max(lengths, key=speed_up)
    about = (
        f"the target takes {target_seconds[1] * 1e3:.2f} ms for 1 token and {target_seconds[best + 1] * 1e3:.2f} ms "
        f"for {best + 1}, the draft {draft_seconds * 1e3:.2f} ms for 1, and {acceptance:.0%} of its tokens are accepted"
    )
    if speed_up(best) <= 1:
        return DraftChoice(0, 1.0, f"plain decoding is faster than any draft (best {speed_up(best):.2f}x): {about}")
    return DraftChoice(best, speed_up(best), about)


def choose_tree_size(target_seconds: dict[int, float], tokens: dict[int, float]) -> DraftChoice:
    """The best size of a tree whose draft tokens come from the target's own forward, so that only that takes time.

    target_seconds: of a forward over N tokens, at least for 1 and every size.
    tokens: expected per forward, by size.
    """

    def speed_up(size: int) -> float:
        return tokens[size] * target_seconds[1] / target_seconds[size]

    best = max(tokens, key=speed_up)
    about = (
        f"the target takes {target_seconds[1] * 1e3:.2f} ms for 1 token and {target_seconds[best] * 1e3:.2f} ms for "
        f"{best}, which give {tokens[best]:.2f} tokens"
    )
    if speed_up(best) <= 1:
        return DraftChoice(0, 1.0, f"plain decoding is faster than any draft (best {speed_up(best):.2f}x): {about}")
    return DraftChoice(best - 1, speed_up(best), about)


def choose_for(lm: "LanguageModel", draft: "Draft", batch_size: int = 1) -> DraftChoice:
    """The draft length for this model, draft and batch on this machine; takes seconds, mostly of compiling.

    Raises ValueError when the draft's acceptance is not known.
    """
    if draft.acceptance is None:
        raise ValueError(
            f"draft_tokens='auto' needs the acceptance that `decodax train draft` writes to draft.json, and "
            f"{draft.lm.path.name} has none: give a number"
        )
    sizes = (1, *(length + 1 for length in LENGTHS))
    target = latency_curve(lm.model, lm.params, sizes, batch_size=batch_size)
    single = latency_curve(draft.lm.model, draft.lm.params, (1,), batch_size=batch_size)[1]
    return choose_draft_tokens(target, single, draft.acceptance)
