"""Runs the training loop: one jitted step, a progress bar, a log, checkpoints, and a clean stop on a signal.

The loop knows no model. A task says what is trained, what is frozen, which rows a step reads and what their loss is;
whether that trains a draft model or three prompt embeddings makes no difference here.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decodax.decoding.training.checkpoint import Log, load_tree, read_progress, save_checkpoint
from decodax.decoding.training.optimizer import make_optimizer
from decodax.decoding.training.plan import Plan

Params = dict[str, Any]
Loss = Callable[[Params, Any, Int[Array, "B T_plus_1"], Int[Array, ""]], Float[Array, ""]]
AnyPlan = TypeVar("AnyPlan", bound=Plan)
MOVABLE = ("steps", "decay_from", "long_from")  # fields of a plan that may change during a run


@dataclass(frozen=True)
class Task:
    """What a run trains.

    loss: (trained, frozen, rows, step) -> mean loss, differentiated with respect to `trained` alone. Its random numbers
        follow from the step, so that a resumed run draws the same.
    trained: the parameters at step 0.
    rows: the rows of any step, from the step alone.
    frozen: arrays that the loss reads and nothing changes.
    measure: (trained) -> named numbers for the log, on held-out text.
    about: what else a resumed run must agree with (sizes, the text's fingerprint), as JSON values.
    """

    loss: Loss
    trained: Params
    rows: Callable[[int], Int[np.ndarray, "B T_plus_1"]]
    frozen: Any = None
    measure: Callable[[Params], dict[str, float]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    params: after `step` steps.
    finished: false when the run was asked to stop before its last step.
    """

    params: Params
    step: int
    finished: bool


def resumed_plan(folder: Path, plan: AnyPlan) -> AnyPlan:
    """The plan of the folder's checkpoint, moved to the last step of `plan`; `plan` itself without a checkpoint.

    Raises ValueError when the checkpoint's plan differs in something else, or the run is already past that step.
    """
    progress = read_progress(folder)
    if progress is None:
        return plan
    _refuse_changes(folder, progress.plan, asdict(plan), MOVABLE)
    stored = type(plan)(**progress.plan)
    return stored if stored.steps == plan.steps else stored.finishing_by(plan.steps, progress.step)


def _refuse_changes(folder: Path, stored: Mapping, given: Mapping, movable: tuple[str, ...] = ()) -> None:
    changed = [
        f"{name} was {stored.get(name)!r}, now {given.get(name)!r}"
        for name in sorted({*stored, *given} - {*movable})
        if stored.get(name) != given.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Give the same settings to resume it, or "
            "another run folder to start anew"
        )


def make_step(loss: Loss, optimizer: Any) -> Callable:
    """`step(trained, state, frozen, rows, number, rate) -> (trained, state, loss)`, jitted; `number` is the step's.

    It donates the memory of the first two.
    """

    def step(trained, state, frozen, rows, number, rate):
        value, gradient = jax.value_and_grad(loss)(trained, frozen, rows, number)
        update, state = optimizer.update(gradient, state, trained)
        trained = jax.tree.map(lambda leaf, change: leaf + (rate * change).astype(leaf.dtype), trained, update)
        return trained, state, value

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    folder: Path,
    plan: Plan,
    task: Task,
    *,
    report_every: int = 20,
    measure_every: int = 200,
    checkpoint_seconds: float = 150.0,
    unsaved: Callable[[int], None] = lambda steps: None,
) -> Trained:
    """Trains to the plan's last step, from the folder's checkpoint where there is one.

    Reports go to `log.jsonl` in the folder and to stderr, as a progress bar or, without a terminal, as lines. A
    checkpoint is written every `checkpoint_seconds`, at the end, and when the process is asked to end (SIGTERM, Ctrl-C;
    the current step is finished first).

    unsaved: called after each step, and each checkpoint, with the number of steps that no checkpoint holds.
    Raises ValueError when the checkpoint belongs to another task.
    Raises FloatingPointError when the loss is non-finite; the last checkpoint is kept.
    """
    optimizer = make_optimizer(plan)
    trained = jax.tree.map(lambda leaf: leaf.copy(), task.trained)  # the step donates its arguments
    state, step = optimizer.init(trained), 0
    if progress := read_progress(folder):
        _refuse_changes(folder, progress.about, task.about)
        step, (trained, state) = progress.step, load_tree(folder, (trained, state))
    update, log = make_step(task.loss, optimizer), Log(folder / "log.jsonl", step)
    saved_at, saved_step = time.perf_counter(), step
    with _stop_requests() as asked_to_stop, _progress_bar(plan.steps, step) as bar:
        reports = _Reports(plan, task, log, bar)
        while step < plan.steps and not asked_to_stop:
            rows = task.rows(step)
            trained, state, loss = update(
                trained, state, task.frozen, rows, np.int32(step), np.float32(plan.learning_rate(step))
            )
            step += 1
            unsaved(step - saved_step)
            reports.add(loss, rows.size - len(rows))
            if step % report_every == 0 or step == plan.steps:
                reports.write(step, trained, measure=step % measure_every == 0 or step == plan.steps)
            if time.perf_counter() - saved_at > checkpoint_seconds:
                save_checkpoint(folder, step, asdict(plan), task.about, (trained, state))
                saved_at, saved_step = time.perf_counter(), step
                unsaved(0)
        save_checkpoint(folder, step, asdict(plan), task.about, (trained, state))
        unsaved(0)
    return Trained(trained, step, step == plan.steps)


@dataclass
class _Reports:
    """Collects the losses between two reports, and writes each report to the log, the bar and, without one, stderr."""

    plan: Plan
    task: Task
    log: Log
    bar: Progress
    losses: list[Array] = field(default_factory=list)
    tokens: int = 0
    since: float = field(default_factory=lambda: time.perf_counter())

    def add(self, loss: Array, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        self.bar.advance(self.bar.task_ids[0])

    def write(self, step: int, trained: Params, *, measure: bool) -> None:
        mean = float(np.mean(jax.device_get(self.losses)))
        if not np.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean} near step {step}; start again with a lower learning rate")
        speed = self.tokens / (time.perf_counter() - self.since)
        entry = {"step": step, "loss": mean, "learning_rate": self.plan.learning_rate(step - 1), "tokens/s": speed}
        if measure and self.task.measure is not None:
            entry |= self.task.measure(trained)
        self.log.write(entry)
        self.bar.update(self.bar.task_ids[0], loss=mean, speed=speed)
        if not self.bar.console.is_terminal:
            print(" ".join(f"{name} {value:.5g}" for name, value in entry.items()), file=sys.stderr, flush=True)
        self.losses, self.tokens, self.since = [], 0, time.perf_counter()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects the signals that ask the process to end, instead of ending it; a second Ctrl-C ends it at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return
    handled = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, remember) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_bar(steps: int, done: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    numbers = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s")
    progress = Progress(*columns, numbers, console=Console(stderr=True))
    progress.disable = not progress.console.is_terminal
    progress.add_task("training", total=steps, completed=done, loss=float("nan"), speed=0.0)
    return progress
