"""Answers a file of prompts, any number of them, a batch at a time: `decodax generate --input --output`."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from decodax.decoding.answer_file import AnswerFile
from decodax.decoding.generated import Stats
from decodax.decoding.logits_processors import METHODS as PROCESSORS
from decodax.decoding.options import GenerateOptions
from decodax.decoding.prompt_file import PromptLine, read_prompt_file
from decodax.decoding.random import fold_seed
from decodax.decoding.refilled import FinishedRow, RefilledBatch, Settings
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_SHOWN = 64  # numbers of a weight in the checksum of a run


@dataclass(frozen=True)
class Report:
    """What became of a file of prompts.

    num_lines: prompts in the file.
    num_before: answers that a run before had written.
    errors: what was wrong, by the index of the line.
    stats: of the lines that this run answered; None if there were none.
    """

    num_lines: int
    num_before: int
    errors: dict[int, str]
    stats: Stats | None


def answer_prompts(
    lm: "LanguageModel",
    source: Path,
    target: Path,
    options: GenerateOptions,
    *,
    chat: bool = False,
    system: str | None = None,
    on_answer: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> Report:
    """Writes an answer for every line of `source` into `target`, in their order; the same command resumes.

    A line's answer is {"index", "text", "tokens", "finish_reason", "seed"}, or {"index", "error"} for a line that
    cannot be read. Its tokens are those of its prompt alone with its seed, which is `fold_seed(seed, index)` where the
    line gives none.

    options: for all lines that do not give their own; `batch_size` of them run at once.
    chat, system: as for `read_prompt_file`.
    on_answer: called with the answers so far, all lines, and the tokens of the new answer.
    Raises ValueError for a target that is complete or belongs to another run.
    """
    lines, errors = read_prompt_file(lm, source, options, chat=chat, system=system)
    total, answers = len(lines) + len(errors), AnswerFile(target, _run(lm, source, options, chat=chat, system=system))
    num_before = len(answers.done)
    try:
        for index, message in errors.items():
            if index not in answers.done:
                answers.add(index, {"error": message})
        waiting = [line for line in lines if line.index not in answers.done]
        batch, finished = _batch(lm, waiting, options), []
        on_answer(len(answers.done), total, 0)
        for row in batch.run() if batch is not None else ():
            answers.add(waiting[row.index].index, _answer(row))
            finished.append((len(row.tokens), row.num_cut_tokens))
            on_answer(len(answers.done), total, len(row.tokens))
        answers.finish()
    finally:
        answers.close()
    stats = None if batch is None else batch.stats(sum(len(line.ids) for line in waiting), finished)
    return Report(total, num_before, errors, stats)


def _batch(lm: "LanguageModel", lines: list[PromptLine], options: GenerateOptions) -> RefilledBatch | None:
    """The batch that answers these lines."""
    if not lines:
        return None
    per_line = {
        name: [line.options.get(name, getattr(options, name)) for line in lines]
        for name in PROCESSORS
        if any(name in line.options for line in lines)
    }
    vocab_size, ends = lm.config.vocab_size, options.end_tokens(lm.end_token_ids, lm.config.vocab_size)
    seeds = [int(line.options.get("seed", fold_seed(options.seed, line.index))) % 2**32 for line in lines]
    new = [int(min(line.options.get("max_new_tokens", options.max_new_tokens), 2**31 - 1)) for line in lines]
    sampling = dataclasses.replace(options, **per_line).sampling(len(lines), vocab_size, ends)
    settings = Settings(np.asarray(seeds, np.uint32), sampling, ends, np.asarray(new))
    return RefilledBatch(lm, [line.ids for line in lines], options, settings)


def _answer(row: FinishedRow) -> dict[str, Any]:
    text = {} if row.text is None else {"text": row.text}
    return {**text, "tokens": row.tokens.tolist(), "finish_reason": row.finish_reason, "seed": row.seed}


def _run(lm: "LanguageModel", source: Path, options: GenerateOptions, *, chat: bool, system: str | None) -> str:
    """A checksum of what the answers depend on."""
    checksum = hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(2**20):
            checksum.update(piece)
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for name in ("on_text", "batch_size", "block_tokens"):  # which change no answer
        del values[name]
    checksum.update(repr((values, chat, system, str(lm.path), str(lm.dtype), lm.model.invariant, lm.config)).encode())
    for leaf in jax.tree.leaves(lm.params):  # a few numbers of each weight, which adapters change
        checksum.update(np.asarray(to_host(leaf[(0,) * (leaf.ndim - 1)][:_SHOWN])).tobytes())
    return checksum.hexdigest()
