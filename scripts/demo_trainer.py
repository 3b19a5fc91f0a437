"""The training loop of the embedded model: plan, data order, optimizer, checkpoints. `train_demo.py` is what to run.

The optimizer is Muon for the layers' matrices (Jordan 2024; scaled to AdamW's step size as in "Muon is Scalable for LLM
Training", arXiv 2502.16982; Turbo-Muon's preconditioning, arXiv 2512.04632, saves one of five iterations) and Adam for
the embedding and the norms. The learning rate warms up, stays, and falls to zero over the last third (warmup-stable-
decay, arXiv 2405.18392), so that a run can be told to finish earlier: only the fall moves.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Params = dict[str, Any]
Hidden = Callable[[Params, Int[Array, "B T"]], Float[Array, "B T D"]]


@dataclass(frozen=True)
class Plan:
    """What a run does from its first step to its last. It is stored with each checkpoint, so a resume follows it.

    `decay_from` and `long_from` are the steps at which the learning rate begins to fall and the rows grow from
    `short_tokens` to `window_tokens`. `test_share` is the part of the test files read in one pass over the code.
    """

    steps: int = 2000
    decay_from: int = 1600
    long_from: int = 1700
    warmup: int = 100
    peak: float = 1e-2
    weight_decay: float = 0.1
    windows_per_step: int = 4
    window_tokens: int = 1024
    short_tokens: int = 512
    test_share: float = 0.1
    optimizer: str = "muon"
    seed: int = 0

    def finishing_by(self, steps: int, now: int = 0) -> "Plan":
        """The same run with another last step; the fall begins a third before it, though not before step `now`.

        Raises:
            ValueError: the run is already past that step.
        """
        if steps <= now:
            raise ValueError(f"the last step must be after the checkpoint's step {now}, got {steps}")
        return replace(self, steps=steps, decay_from=max(now, int(0.65 * steps)), long_from=max(now, int(0.85 * steps)))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, the peak, then `1 - sqrt(progress)` down to zero at the last step."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = max(0, step - self.decay_from) / max(1, self.steps - self.decay_from)
        return self.peak * rise * (1 - fall**0.5)


class Batches:
    """The training rows of any step, computed from the step alone, so that a resumed run reads what it would have read.

    One pass lays all code files and a rotating share of the test files end to end in random order, each behind a
    separator, and cuts the result into windows, which are drawn in random order. A step takes a few windows, whole or
    cut into shorter rows.
    """

    def __init__(self, code: list[np.ndarray], tests: list[np.ndarray], plan: Plan, separator: int = 0):
        self.documents = [np.concatenate([[separator], ids]).astype(np.int32) for ids in (*code, *tests)]
        self.number_of_code, self.plan = len(code), plan
        self.passes: list[tuple[int, int]] = []  # first window of each pass so far, windows in it
        self.rows: tuple[int, np.ndarray] | None = None
        if sum(map(len, self.documents[: len(code)])) <= (size := plan.window_tokens * plan.windows_per_step):
            raise ValueError(f"the code must hold more tokens than one step ({size}); give more text or a smaller plan")

    def _one_pass(self, number: int) -> np.ndarray:
        random = np.random.default_rng([self.plan.seed, number])
        period = max(1, round(1 / self.plan.test_share)) if self.plan.test_share else 0
        tests = range(self.number_of_code + number % period, len(self.documents), period) if period else ()
        order = random.permutation([*range(self.number_of_code), *tests])
        stream = np.concatenate([self.documents[i] for i in order])
        stream = np.roll(stream, random.integers(len(stream)))
        size = self.plan.window_tokens
        count = (len(stream) - 1) // size
        # One token more than the window: the targets are the inputs moved by one.
        windows = np.lib.stride_tricks.sliding_window_view(stream, size + 1)[: count * size : size]
        return windows[random.permutation(count)]

    def _window(self, index: int) -> np.ndarray:
        number = next((i for i, (first, count) in enumerate(self.passes) if first <= index < first + count), None)
        while number is None:
            first = sum(self.passes[-1]) if self.passes else 0
            self.rows = (len(self.passes), self._one_pass(len(self.passes)))
            self.passes.append((first, len(self.rows[1])))
            number = self.rows[0] if index < sum(self.passes[-1]) else None
        if self.rows is None or self.rows[0] != number:
            self.rows = (number, self._one_pass(number))
        return self.rows[1][index - self.passes[number][0]]

    def at(self, step: int) -> Int[np.ndarray, "B T_plus_1"]:
        """The rows of a step, each one token longer than what the model reads."""
        plan = self.plan
        first = step * plan.windows_per_step
        windows = [self._window(index) for index in range(first, first + plan.windows_per_step)]
        if step >= plan.long_from:
            return np.stack(windows)
        size = plan.short_tokens
        return np.stack([row[i : i + size + 1] for row in windows for i in range(0, plan.window_tokens, size)])


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """The optimizer at learning rate 1; the step multiplies its update by the rate of the moment.

    Raises:
        ValueError: the plan names an optimizer other than muon or adamw.
    """

    def matrices(params: Params) -> Params:
        def one(path, leaf: Array):
            is_layer_matrix = leaf.ndim == 2 and "embed" not in jax.tree_util.keystr(path)
            return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0) if is_layer_matrix else None

        return jax.tree.map_with_path(one, params)

    if plan.optimizer == "muon":
        update = optax.contrib.muon(
            1.0,
            ns_steps=4,
            preconditioning="aol",
            weight_decay=plan.weight_decay,
            consistent_rms=0.2,
            adam_b2=0.99,
            muon_weight_dimension_numbers=matrices,
        )
    elif plan.optimizer == "adamw":
        update = optax.adamw(
            1.0, b2=0.99, weight_decay=plan.weight_decay, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim == 2, p)
        )
    else:
        raise ValueError(f"the optimizer must be muon or adamw, got {plan.optimizer!r}")
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def mean_loss(forward: Hidden, head: Callable, params: Params, rows: Int[Array, "B T_plus_1"]) -> Float[Array, ""]:
    """Mean negative log-likelihood, in nats per token, of each row's tokens after the first."""
    logits = head(params, forward(params, rows[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def make_step(forward: Hidden, head: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, state, rows, rate) -> (params, state, loss)`, one jitted function that reuses its memory."""

    def step(params, state, rows, rate):
        loss, gradient = jax.value_and_grad(lambda params: mean_loss(forward, head, params, rows))(params)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda leaf: rate * leaf, update)), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def save_checkpoint(folder: Path, step: int, plan: Plan, tree: Any) -> None:
    """Replaces the folder's checkpoint at once: whoever interrupts finds the old one or the new one, never half."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    temporary = folder / "checkpoint.tmp"
    save_file(leaves, temporary, metadata={"step": str(step), "plan": json.dumps(asdict(plan))})
    os.replace(temporary, folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, like: Any) -> tuple[int, Plan, Any] | None:
    """Step, plan and tree of the folder's checkpoint in the structure of `like`; None when there is none.

    Raises:
        ValueError: the checkpoint belongs to another model or optimizer.
    """
    file = folder / "checkpoint.safetensors"
    if not file.exists():
        return None
    with safe_open(file, "numpy") as opened:
        about = opened.metadata()
    leaves = load_file(file)
    paths, structure = jax.tree.flatten_with_path(like)
    expected = {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if expected != found:
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(f"{file} belongs to another model or optimizer: {len(odd)} leaves differ, such as {odd[0]}")
    tree = jax.tree.unflatten(structure, [jnp.asarray(leaves[jax.tree_util.keystr(path)]) for path, _ in paths])
    return int(about["step"]), Plan(**json.loads(about["plan"])), tree


def load_params(folder: Path) -> Params:
    """The parameters alone of the folder's checkpoint, as NumPy arrays.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    file = folder / "checkpoint.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"expected a checkpoint at {file}; train first")
    params: Params = {}
    for name, leaf in load_file(file).items():
        # A leaf of the saved pair (params, state) is called "[0]['blocks_0']['mixer']['query']".
        first, *path = [part.strip("'") for part in name[1:-1].split("][")]
        if first == "0":
            subtree = params
            for part in path[:-1]:
                subtree = subtree.setdefault(part, {})
            subtree[path[-1]] = leaf
    return params


@dataclass
class Log:
    """One JSON line per report in `log.jsonl`; lines behind a checkpoint that is resumed from are cut off."""

    file: Path
    step: int

    def __post_init__(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        self.file.write_text("".join(line + "\n" for line in kept))

    def write(self, **entry: int | float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def train(
    folder: Path,
    plan: Plan,
    batches: Callable[[Plan], Batches],
    model: tuple[Hidden, Callable, Params],
    *,
    finish_by: int | None = None,
    heldout: np.ndarray | None = None,
    report_every: int = 20,
    checkpoint_seconds: float = 300.0,
) -> Params:
    """Trains to the plan's last step, or resumes the folder's checkpoint under the checkpoint's own plan.

    `model` is the forward function, the head and fresh parameters. `finish_by` moves the last step. A checkpoint is
    written every `checkpoint_seconds`, at the end, and when the process is asked to terminate.

    Raises:
        FloatingPointError: the loss is no longer a number; the last checkpoint is kept.
    """
    forward, head, params = model
    optimizer = make_optimizer(plan)
    state = optimizer.init(params)
    step = 0
    if resumed := load_checkpoint(folder, (params, state)):
        step, plan, (params, state) = resumed
        print(f"resuming at step {step} of {plan.steps}", flush=True)
    if finish_by is not None:
        plan = plan.finishing_by(finish_by, step)
    update, source = make_step(forward, head, optimizer), batches(plan)
    judge = jax.jit(lambda params, rows: mean_loss(forward, head, params, rows))
    log = Log(folder / "log.jsonl", step)

    def report(losses: list[Array], tokens: int, seconds: float) -> None:
        mean = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean} near step {step}; lower --peak and start again")
        rate, speed = plan.learning_rate(step - 1), tokens / seconds
        entry = {"step": step, "loss": mean, "learning_rate": rate, "tokens/s": speed}
        if heldout is not None and (step % (10 * report_every) == 0 or step == plan.steps):
            parts = [judge(params, heldout[i : i + 8]) for i in range(0, len(heldout) - 7, 8)]
            entry["heldout_loss"] = float(np.mean(jax.device_get(parts)))
        log.write(**entry)
        bar.update(task, completed=step, loss=mean, speed=speed)
        if not bar.console.is_terminal:
            print(" ".join(f"{name} {value:.5g}" for name, value in entry.items()), flush=True)

    asked_to_stop: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    saved_at = reported_at = time.perf_counter()
    losses: list[Array] = []
    tokens = 0
    try:
        with _progress() as bar:
            task = bar.add_task("training", total=plan.steps, completed=step, loss=float("nan"), speed=0.0)
            while step < plan.steps and not asked_to_stop:
                rows = source.at(step)
                params, state, loss = update(params, state, rows, np.float32(plan.learning_rate(step)))
                losses.append(loss)
                tokens += rows.size - len(rows)
                step += 1
                if step % report_every == 0 or step == plan.steps:
                    jax.block_until_ready(loss)
                    report(losses, tokens, time.perf_counter() - reported_at)
                    losses, tokens, reported_at = [], 0, time.perf_counter()
                if time.perf_counter() - saved_at > checkpoint_seconds:
                    save_checkpoint(folder, step, plan, (params, state))
                    saved_at = time.perf_counter()
        save_checkpoint(folder, step, plan, (params, state))
    finally:
        signal.signal(signal.SIGTERM, previous)
    return params


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    numbers = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s")
    progress = Progress(*columns, numbers)
    progress.disable = not progress.console.is_terminal
    return progress
