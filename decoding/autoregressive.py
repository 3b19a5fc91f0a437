"""Decodes one token per forward of the model, in one compiled loop (plain autoregressive decoding).

Every faster strategy is compared with it. It is also the smallest example of a strategy:

    decode = autoregressive(model)
    state = jax.jit(decode, donate_argnums=1)(params, state)
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.loop import run_until_done
from decodax.decoding.sampling import choose, has_choice, processed_logits, token_logprob
from decodax.decoding.state import DecodeState
from decodax.models.model import Model, Params, commit

Decode = Callable[..., DecodeState]


def autoregressive(model: Model) -> Decode:
    """`decode(params, state, max_tokens=None)`: continues every row until all are done, or by `max_tokens` tokens."""

    def step(params: Params, state: DecodeState) -> DecodeState:
        out = model.apply(params, state.last_token()[:, None], state.length[:, None] - 1, state.caches)
        logits = model.logits(params, out.hidden)[:, 0]
        token = choose(state.sampling, logits, state.history, state.seed, state.length)
        logprob = token_logprob(logits, token)
        # A finite step has a finite logprob. The commit depends on it, which keeps non-finite steps out of the cache,
        # and lets XLA write in place (see KVCache.commit).
        finite = jnp.isfinite(logprob)
        if state.sampling.has_own:
            finite &= has_choice(state.sampling, processed_logits(state.sampling, logits, state.history))
        failed = ~state.done & ~finite
        caches = state.caches
        state, emitted = state.append(token[:, None], logprob[:, None], finite.astype(jnp.int32))
        return dataclasses.replace(
            state,
            caches=commit(caches, out.cache_updates, emitted),
            failed=state.failed | failed,
            done=state.done | failed,
            num_target_forwards=state.num_target_forwards + 1,
            layer_counts=state.layer_counts.add(model.config.num_layers, model.config.num_layers, emitted > 0),
        )

    def decode(params: Params, state: DecodeState, max_tokens: Int[Array, ""] | int | None = None) -> DecodeState:
        return run_until_done(lambda state: step(params, state), state, max_tokens, model.execution)

    return decode
