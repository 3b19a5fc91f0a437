"""Makes a `decodax train` command of a function that sets a training up: shared options, the run, and the report."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from decodax.cli import interrupts, session
from decodax.cli import train_options as option
from decodax.decoding.training.part import PartTraining

Command = Callable[..., None]
Summary = Callable[[dict[str, Any]], str]


def training(
    *, summary: Summary, tokens: int, learning_rate: float, optimizer: str | None = None
) -> Callable[[Callable[..., PartTraining]], Command]:
    """A decorator: turns `def kind(ready: Ready, own_option: ... = ...) -> PartTraining` into the command of that name.

    summary: what the report says of the facts to people. tokens, learning_rate, optimizer: the defaults of these
    options; without an optimizer it is adamw, and --optimizer is not offered.
    """

    def command_of(set_up: Callable[..., PartTraining]) -> Command:
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
                facts = _carry_out(set_up(ready, **own_options), out)
                _report(out, facts, summary, as_json)

        _describe(command, set_up, without=() if optimizer else ("optimizer",))
        return command

    return command_of


def _describe(command: Any, set_up: Callable[..., PartTraining], without: tuple[str, ...]) -> None:
    """Gives a command the name and the text of `set_up`, and its options too, behind `tokens` among the shared ones.

    Typer makes the options from the signature and the annotations of the function that it is given, and a function
    cannot be written with parameters that stand elsewhere: both are put together here.
    """
    shared = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in without
    ]
    _, *own = inspect.signature(set_up).parameters.values()  # the first is what is ready
    place = 1 + [parameter.name for parameter in shared].index("tokens")
    # By keyword only, as Typer passes them: then one without a default may follow one that has one.
    shared[place:place] = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own]
    command.__signature__ = inspect.Signature(shared, return_annotation=None)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in shared} | {"return": None}
    command.__name__, command.__qualname__, command.__doc__ = set_up.__name__, set_up.__qualname__, set_up.__doc__


def _carry_out(part_training: PartTraining, out: Path) -> dict[str, Any]:
    """Trains and writes the part; gives its facts. Ends the command where the run was asked to stop."""
    part_training.refuse_foreign(out)
    trained = part_training.train(unsaved=interrupts.unsaved)
    if not trained.finished:
        print(
            f"stopped at step {trained.step} of {part_training.plan.steps}: the same command goes on", file=sys.stderr
        )
        raise typer.Exit(interrupts.INTERRUPTED)
    with session.progress("measuring"):
        return part_training.export(out, trained.params, trained.step, out / "loss.png")


def _report(out: Path, facts: dict[str, Any], summary: Summary, as_json: bool) -> None:
    """Prints the facts for programs, or a summary for people."""
    if as_json:
        print(json.dumps(facts | {"path": str(out), "versions": session.versions()}))
        return
    size = f"{facts['num_parameters']:,} parameters, trained on {facts['trained_tokens']:,} tokens"
    print(f"{out}: {size}\n{summary(facts)}")
