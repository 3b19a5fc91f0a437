"""Plain decoding: one token per forward of the model, in one compiled loop.

The reference that every faster strategy is compared with, and the smallest example of a strategy:

    decode = autoregressive(model)
    state = jax.jit(decode, donate_argnums=1)(params, state)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.sampling import choose, token_logprob
from decodax.decoding.state import DecodeState
from decodax.models.model import Model, Params, commit

Decode = Callable[..., DecodeState]


def autoregressive(model: Model) -> Decode:
    """`decode(params, state, max_steps=None)`: continues every row until all are done, or for `max_steps` tokens."""

    def step(params: Params, state: DecodeState) -> DecodeState:
        out = model.apply(params, state.pending()[:, None], state.length[:, None] - 1, state.caches)
        logits = model.logits(params, out.hidden)[:, 0]
        token = choose(state.sampling, logits, state.history, state.seed, state.length)
        logprob = token_logprob(logits, token)
        # A sound step has a finite logprob. That the commit asks for it keeps broken rows out of the cache, and lets
        # XLA write in place (see KVCache.commit).
        sound = jnp.isfinite(logprob)
        emit = ~state.done & sound
        failed = ~state.done & ~sound
        state = dataclasses.replace(
            state,
            caches=commit(state.caches, out.rows, emit.astype(jnp.int32)),
            failed=state.failed | failed,
            done=state.done | failed,
            num_target_forwards=state.num_target_forwards + 1,
        )
        return state.append(token, logprob, emit)

    def decode(params: Params, state: DecodeState, max_steps: Int[Array, ""] | int | None = None) -> DecodeState:
        left = jnp.int32(jnp.iinfo(jnp.int32).max if max_steps is None else max_steps)

        def unfinished(carry: tuple[Array, DecodeState]) -> Array:
            left, state = carry
            return (left > 0) & ~jnp.all(state.done)

        def advance(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
            left, state = carry
            return left - 1, step(params, state)

        return jax.lax.while_loop(unfinished, advance, (left, state))[1]

    return decode
