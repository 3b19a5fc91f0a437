"""Runs the decoding loop: repeats a compiled step until all rows are done, or one has enough tokens for now."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.state import DecodeState
from decodax.layers.execution import Execution


def run_until_done(
    step: Callable[[DecodeState], DecodeState],
    state: DecodeState,
    max_tokens: Int[Array, ""] | int | None,
    execution: Execution,
) -> DecodeState:
    """Repeats `step` until every row is done, or, with `max_tokens`, until some row has that many more.

    step: one round.
    state: where to start.
    max_tokens: None for no limit; a step that emits several tokens may go past it, and they are kept.
    execution: its sharding constraints hold for the state in every round; a drafter constrains its own state
        (`Drafter.constrained`).
    """
    target_tokens = jnp.int32(jnp.iinfo(jnp.int32).max if max_tokens is None else max_tokens)
    begin = state.length

    def unfinished(state: DecodeState) -> Array:
        return (jnp.max(state.length - begin) < target_tokens) & ~jnp.all(state.done)

    def constrained(state: DecodeState) -> DecodeState:
        without_draft = execution.constrained(dataclasses.replace(state, draft=None))
        return dataclasses.replace(without_draft, draft=state.draft)

    return jax.lax.while_loop(unfinished, lambda state: constrained(step(state)), constrained(state))
