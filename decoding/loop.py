"""The loop of every strategy: rounds of a compiled step until all rows are done, or far enough for now."""

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
    """Repeats `step` until every row is done, or, with `max_tokens`, until some row has gained so many.

    A step that emits several tokens may go past `max_tokens`; what is emitted is kept. Over a mesh the state lies where
    it lay, in every round; of what a drafter carries, the drafter says so itself (`Drafter.laid_out`).
    """
    aim = jnp.int32(jnp.iinfo(jnp.int32).max if max_tokens is None else max_tokens)
    begin = state.length

    def unfinished(state: DecodeState) -> Array:
        return (jnp.max(state.length - begin) < aim) & ~jnp.all(state.done)

    def laid_out(state: DecodeState) -> DecodeState:
        placed = execution.laid_out(dataclasses.replace(state, draft=None))
        return dataclasses.replace(placed, draft=state.draft)

    return jax.lax.while_loop(unfinished, lambda state: laid_out(step(state)), laid_out(state))
