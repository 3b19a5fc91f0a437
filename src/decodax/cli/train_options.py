"""Defines the options that all `decodax train` commands share, and makes a model, a plan and texts from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import decodax
from decodax.cli import session
from decodax.decoding.training.loop import resumed_plan
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_files import encode, read_texts
from decodax.decoding.training.texts import Texts, hold_out
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message

PLAN = Plan()

Text = Annotated[
    list[Path],
    typer.Option(help="A file to train on, or a folder of them (may be repeated): text like what is to be decoded."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to train on, in all passes over the text.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows per step.")]
Window = Annotated[int | None, typer.Option(min=2, help="Tokens per window. Default: 1024, or the model's context.")]
ShortWindow = Annotated[
    int | None, typer.Option(min=1, help="Tokens per row until the last part of the run. Default: a quarter.")
]
LearningRate = Annotated[float, typer.Option(help="The highest; it warms up, and falls in the end.")]
Optimizer = Annotated[str, typer.Option(help="muon or adamw.")]
Heldout = Annotated[float, typer.Option(min=0.001, max=0.5, help="Share of the text to measure on, not to train on.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed draws other weights and another order.")]
Run = Annotated[
    Path | None, typer.Option(help="The folder for checkpoints and the log. Default: beside OUT, ending in .run.")
]


@dataclass(frozen=True)
class Ready:
    """The inputs of every training: the model, the plan, the texts, and the folder of the run."""

    lm: decodax.LanguageModel
    plan: Plan
    texts: Texts
    run: Path


@dataclass(frozen=True)
class Schedule:
    """Options of every training: how many tokens, in which windows, the learning rate, and what is held out."""

    tokens: int
    batch: int
    window: int | None
    short_window: int | None
    learning_rate: float
    optimizer: str
    heldout: float
    seed: int

    def plan(self, lm: decodax.LanguageModel) -> Plan:
        window = self.window or min(PLAN.window_tokens, lm.config.max_position_embeddings)
        return Plan(
            peak=self.learning_rate,
            windows_per_step=self.batch,
            window_tokens=window,
            short_tokens=self.short_window or (window if window % 4 else window // 4),
            optimizer=self.optimizer,
            seed=self.seed,
        ).finishing_by(max(1, self.tokens // (self.batch * window)))


def prepare(
    model: str | None, dtype: str | None, text: list[Path], out: Path, run: Path | None, schedule: Schedule
) -> Ready:
    """Loads the model and reads the text; a run with a checkpoint keeps its plan."""
    run = run or out.with_name(f"{out.name}.run")
    lm = decodax.load(model, dtype=dtype)
    plan = schedule.plan(lm)
    with session.progress("reading the text"):
        texts = _texts(lm, text, schedule.heldout, schedule.seed)
    return Ready(lm, resumed_plan(run, plan), texts, run)


def _texts(lm: decodax.LanguageModel, paths: list[Path], heldout: float, seed: int) -> Texts:
    if lm.tokenizer is None:
        raise ValueError(no_tokenizer_message(lm.path, "the text cannot be turned into the model's tokens"))
    train_ids, heldout_ids = hold_out(encode(lm.tokenizer, read_texts(paths)), heldout, seed)
    return Texts(train_ids, heldout_ids, separator=lm.end_token_ids[:1])
