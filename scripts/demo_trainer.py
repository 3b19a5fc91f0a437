"""Defines the training of the embedded model: its plan, its rows of text, its loss. `train_demo.py` runs it.

The loop, the optimizer, the checkpoints and the learning rate are those of `decoding/training/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.training import plan as training_plan
from decodax.decoding.training.loop import Task
from decodax.decoding.training.text_windows import TextWindows

Params = dict[str, Any]
Hidden = Callable[[Params, Int[Array, "B T"]], Float[Array, "B T D"]]


@dataclass(frozen=True)
class Plan(training_plan.Plan):
    """test_share: share of the test files that is read in one pass over the code."""

    short_tokens: int = 512
    long_share: float = 0.15
    test_share: float = 0.1


def text_windows(code: Sequence[np.ndarray], tests: Sequence[np.ndarray], plan: Plan) -> TextWindows:
    """All code and, in each pass, another share of the tests; a separator (id 0) before every file."""
    return TextWindows(code, plan, rotating=tests, rotating_share=plan.test_share, separator=(0,))


def mean_loss(
    forward: Hidden, head: Callable, params: Params, rows: Int[Array | np.ndarray, "B T_plus_1"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood, in nats per token, of each row's tokens after the first."""
    rows = jnp.asarray(rows)
    log_probability = jax.nn.log_softmax(head(params, forward(params, rows[:, :-1])))
    return -jnp.take_along_axis(log_probability, rows[:, 1:, None], axis=-1).mean()


def make_task(
    model: tuple[Hidden, Callable, Params],
    rows: Callable[[int], Int[np.ndarray, "B T_plus_1"]],
    heldout: Int[np.ndarray, "R T_plus_1"] | None = None,
) -> Task:
    """The training of a language model. `model` is the forward function, the head and fresh parameters."""
    forward, head, params = model
    heldout_loss = jax.jit(lambda params, rows: mean_loss(forward, head, params, rows))

    def measure(params: Params) -> dict[str, float]:
        losses = [heldout_loss(params, heldout[i : i + 8]) for i in range(0, len(heldout) - 7, 8)]
        return {"heldout_loss": float(np.mean(jax.device_get(losses)))}

    return Task(
        loss=lambda params, frozen, rows, step: mean_loss(forward, head, params, rows),
        trained=params,
        rows=rows,
        measure=None if heldout is None else measure,
    )
