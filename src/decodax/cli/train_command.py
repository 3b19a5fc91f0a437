"""Makes a `decodax train` command from a function that sets a training up: shared options, the run, and the report."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from decodax.cli import interrupts, session
from decodax.cli import train_options as option
from decodax.cli.signatures import insert_options
from decodax.decoding.training.auxiliary import AuxiliaryTraining

Command = Callable[..., None]
Summary = Callable[[dict[str, Any]], str]


def training(
    *, summary: Summary, tokens: int, learning_rate: float, optimizer: str | None = None
) -> Callable[[Callable[..., AuxiliaryTraining]], Command]:
    """A decorator: turns `def kind(ready: Ready, own_option: ... = ...) -> AuxiliaryTraining` into the command `kind`.

    summary: what the report tells people of the facts.
    tokens, learning_rate: the defaults of these options.
    optimizer: the default; without one it is adamw, and there is no --optimizer.
    """

    def command_of(set_up: Callable[..., AuxiliaryTraining]) -> Command:
        def command(
            *,
            text: option.Text,
            out: option.Out,
            model: session.ModelName = None,
            dtype: session.Dtype = None,
            tokens: option.Tokens = tokens,
            batch: option.Batch = option.PLAN.windows_per_step,
            window: option.Window = None,
            short_window: option.ShortWindow = None,
            learning_rate: option.LearningRate = learning_rate,
            optimizer: option.Optimizer = optimizer or "adamw",
            heldout: option.Heldout = 0.02,
            seed: option.Seed = 0,
            run: option.Run = None,
            as_json: session.Json = False,
            debug: session.Debug = False,
            **own_options: Any,
        ) -> None:
            with session.reported_errors(debug):
                schedule = option.Schedule(tokens, batch, window, short_window, learning_rate, optimizer, heldout, seed)
                ready = option.prepare(model, dtype, text, out, run, schedule)
                facts = _run(set_up(ready, **own_options), out)
                _report(out, facts, summary, as_json)

        _describe(command, set_up, without=() if optimizer else ("optimizer",))
        return command

    return command_of


def _describe(command: Any, set_up: Callable[..., AuxiliaryTraining], without: tuple[str, ...]) -> None:
    """Gives a command the name and the text of `set_up`, and its options too, after `tokens` among the shared ones."""
    _, *own = inspect.signature(set_up).parameters.values()  # the first is `ready`
    insert_options(command, own, after="tokens", without=without)
    command.__name__, command.__qualname__, command.__doc__ = set_up.__name__, set_up.__qualname__, set_up.__doc__


def _run(training: AuxiliaryTraining, out: Path) -> dict[str, Any]:
    """Trains and writes the weights; returns their facts. Ends the command when the run was asked to stop."""
    training.refuse_foreign(out)
    trained = training.train(unsaved=interrupts.unsaved)
    if not trained.finished:
        print(f"stopped at step {trained.step} of {training.plan.steps}: the same command goes on", file=sys.stderr)
        raise typer.Exit(interrupts.INTERRUPTED)
    with session.progress("measuring"):
        return training.export(out, trained.params, trained.step, out / "loss.png")


def _report(out: Path, facts: dict[str, Any], summary: Summary, as_json: bool) -> None:
    """Prints the facts for programs, or a summary for people."""
    if as_json:
        print(json.dumps(facts | {"path": str(out), "versions": session.versions()}))
        return
    size = f"{facts['num_parameters']:,} parameters, trained on {facts['trained_tokens']:,} tokens"
    print(f"{out}: {size}\n{summary(facts)}")
