"""Plain decoding: one token per forward of the model, in one compiled loop.

The reference that every faster strategy is compared with, and the smallest example of a strategy:

    decode = autoregressive(model)
    state = jax.jit(decode, donate_argnums=1)(params, state)
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.loop import run_until_done
from decodax.decoding.sampling import choose, token_logprob
from decodax.decoding.state import DecodeState
from decodax.models.model import Model, Params, commit

Decode = Callable[..., DecodeState]


def autoregressive(model: Model) -> Decode:
    """`decode(params, state, max_tokens=None)`: continues every row until all are done, or by `max_tokens` tokens."""

    def step(params: Params, state: DecodeState) -> DecodeState:
        out = model.apply(params, state.pending()[:, None], state.length[:, None] - 1, state.caches)
        logits = model.logits(params, out.hidden)[:, 0]
        token = choose(state.sampling, logits, state.history, state.seed, state.length)
        logprob = token_logprob(logits, token)
        # A sound step has a finite logprob. That the commit asks for it keeps broken rows out of the cache, and lets
        # XLA write in place (see KVCache.commit).
        sound = jnp.isfinite(logprob)
        failed = ~state.done & ~sound
        caches = state.caches
        state, taken = state.append(token[:, None], logprob[:, None], sound.astype(jnp.int32))
        return dataclasses.replace(
            state,
            caches=commit(caches, out.rows, taken),
            failed=state.failed | failed,
            done=state.done | failed,
            num_target_forwards=state.num_target_forwards + 1,
            layer_counts=state.layer_counts.add(model.config.num_layers, model.config.num_layers, taken > 0),
        )

    def decode(params: Params, state: DecodeState, max_tokens: Int[Array, ""] | int | None = None) -> DecodeState:
        return run_until_done(lambda state: step(params, state), state, max_tokens, model.execution)

    return decode
