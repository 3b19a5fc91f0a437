"""Generates for more prompts than run at once: finished rows of the batch are refilled between blocks of the loop.

Prompts of like length are read together. A row's tokens depend on its own prompt, options and seed alone, so they are
those of the row by itself, whatever stands beside it and whenever it joined.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from decodax.decoding.chunked_prefill import prefill
from decodax.decoding.generated import Generation, Stats
from decodax.decoding.options import GenerateOptions
from decodax.decoding.pace import Pace
from decodax.decoding.ready_strategy import ReadyStrategy
from decodax.decoding.rows import put_rows_in_place, take_rows
from decodax.decoding.running import UNLIMITED, Clock, decode_block, draft_counts_of, kernels_of
from decodax.decoding.sampling import Sampling
from decodax.decoding.sizes import cache_capacity, check_step_fits
from decodax.decoding.state import DecodeState
from decodax.decoding.text_watcher import RowWatcher, needs_text
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

DEFAULT_BATCH = 16  # rows, where nothing is asked for
_SHARE = 8  # rows are refilled once one in so many is free: reading prompts costs a forward, however few they are


@dataclass(frozen=True)
class Settings:
    """What all rows were given.

    seeds: of every sample of every prompt.
    sampling: of every prompt.
    end_tokens: the ids that end a row.
    new_tokens: most tokens to add to every prompt.
    """

    seeds: np.ndarray
    sampling: Sampling
    end_tokens: tuple[int, ...]
    new_tokens: np.ndarray


@dataclass(frozen=True)
class FinishedRow:
    """One row at its end; the fields are those of `Generation`, for one row.

    index: of the row among all.
    num_cut_tokens: what the loop decoded after a stop string.
    """

    index: int
    tokens: np.ndarray
    logprobs: np.ndarray
    text: str | None
    finish_reason: str
    seed: int
    num_cut_tokens: int


@dataclass
class _Counts:
    """What ran so far."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_forwards: int = 0
    row_layers: int = 0
    clock: Clock = field(default_factory=Clock)


def generate_refilled(
    lm: "LanguageModel", prompts: list[np.ndarray], options: GenerateOptions, settings: Settings
) -> Generation:
    """The result of all prompts, in their order; `options.batch_size` of them run at once."""
    runner = RefilledBatch(lm, prompts, options, settings)
    finished = sorted(runner.run(), key=lambda row: row.index)
    return Generation(
        [row.tokens for row in finished],
        None if lm.tokenizer is None else [row.text or "" for row in finished],
        [row.logprobs for row in finished],
        [row.finish_reason for row in finished],
        [row.seed for row in finished],
        runner.stats(sum(map(len, prompts)), [(len(row.tokens), row.num_cut_tokens) for row in finished]),
    )


class RefilledBatch:
    """A batch whose rows are refilled from a queue of prompts; samples of a prompt are rows of their own."""

    def __init__(
        self, lm: "LanguageModel", prompts: list[np.ndarray], options: GenerateOptions, settings: Settings
    ) -> None:
        self._lm, self._options, self._settings = lm, options, settings
        self._prompts = [ids for ids in prompts for _ in range(options.n)]
        context, lengths = lm.config.max_position_embeddings, np.asarray([len(ids) for ids in self._prompts])
        self._new = np.minimum(np.repeat(settings.new_tokens, options.n), context - lengths)
        # The longest first, so that the last rows to end are short ones.
        self._waiting = deque(np.argsort(-(lengths + self._new), kind="stable").tolist())
        self._batch = min(options.batch_size or DEFAULT_BATCH, len(self._prompts))
        self._capacity = cache_capacity(int(np.max(lengths + self._new)), lm.model.execution)
        self._plan = ReadyStrategy(lm, options, self._batch)
        arrays = self._plan.num_logits_arrays(settings.sampling)
        check_step_fits(lm.model, self._batch, self._plan.step_tokens, arrays)
        self._counts = _Counts()
        self._state: DecodeState | None = None
        self._first_forwards = 0

    def run(self) -> Iterator[FinishedRow]:
        """Every row as it ends."""
        rows = [self._waiting.popleft() for _ in range(self._batch)]
        state, watchers = self._read(rows, self._batch), {slot: self._watcher(row) for slot, row in enumerate(rows)}
        length = np.asarray([len(self._prompts[row]) for row in rows])
        self._first_forwards = self._counts.prefill_forwards
        pace = Pace(self._lm.model.execution.mesh, self._counts.prefill_seconds / max(self._first_forwards, 1))
        while watchers:
            state = decode_block(self._plan, state, self._block_tokens(watchers, length), pace)
            self._counts.decode_seconds += self._counts.clock.lap()
            state, length, finished = self._ended(state, watchers)
            yield from finished
            free = [slot for slot in range(self._batch) if slot not in watchers]
            if self._waiting and (len(free) * _SHARE >= self._batch or not watchers):
                joining = [self._waiting.popleft() for _ in free[: len(self._waiting)]]
                state = self._refill(state, free[: len(joining)], joining)
                watchers |= {slot: self._watcher(row) for slot, row in zip(free, joining, strict=False)}
                length[free[: len(joining)]] = [len(self._prompts[row]) for row in joining]
        self._state = state

    def _block_tokens(self, watchers: dict[int, RowWatcher], length: np.ndarray) -> int:
        """Tokens until the next look: where rows wait, no more than the first row to end at its limit still takes."""
        if not self._waiting:
            return self._options.block_tokens if needs_text(self._options) else UNLIMITED
        left = (row.prompt_length + self._new[row.index] - length[slot] for slot, row in watchers.items())
        return int(min(self._options.block_tokens, *left))

    def stats(self, num_prompt_tokens: int, finished: list[tuple[int, int]]) -> Stats:
        """The counts and times of the run, once it has ended.

        finished: of every row, its tokens and those that were cut off.
        """
        state, plan, counts = self._state, self._plan, self._counts
        assert state is not None
        layers = to_host(state.layer_counts)
        return Stats(
            num_prompt_tokens=num_prompt_tokens * self._options.n,
            num_new_tokens=sum(new for new, _ in finished),
            prefill_forwards=counts.prefill_forwards,
            target_forwards=int(state.num_target_forwards) - self._first_forwards,
            prefill_seconds=counts.prefill_seconds,
            decode_seconds=counts.decode_seconds,
            compile_seconds=counts.clock.compiled,
            strategy=plan.name,
            num_layers=self._lm.config.num_layers,
            layer_forwards=int(layers.batch),
            row_layers=counts.row_layers,
            num_cut_tokens=sum(cut for _, cut in finished),
            fallback=plan.fallback,
            kernels=kernels_of(self._lm, plan, state, max(map(len, self._prompts))),
            **draft_counts_of(state),
        )

    def _watcher(self, row: int) -> RowWatcher:
        return RowWatcher(self._lm, self._options, row, self._prompts[row])

    def _read(self, rows: list[int], size: int) -> DecodeState:
        """The state of these rows' prompts, the last of them repeated up to `size`."""
        rows = rows + rows[-1:] * (size - len(rows))
        lengths = np.asarray([len(self._prompts[row]) for row in rows], np.int32)
        tokens = np.zeros((size, lengths.max()), np.int64)
        for place, row in enumerate(rows):
            tokens[place, : lengths[place]] = self._prompts[row]
        state = prefill(
            self._lm.model,
            self._plan.params,
            tokens,
            lengths,
            self._new[rows],
            self._settings.seeds[rows],
            sampling=take_rows(self._settings.sampling, np.asarray(rows) // self._options.n),
            stop_token_ids=self._settings.end_tokens,
            layer_policy=self._plan.layer_policy,
            capacity=self._capacity,
        )
        state = self._plan.start(state)
        self._counts.prefill_forwards += int(state.num_target_forwards)
        jax.block_until_ready(state)
        self._counts.prefill_seconds += self._counts.clock.lap()
        return state

    def _refill(self, state: DecodeState, slots: list[int], rows: list[int]) -> DecodeState:
        """The state with new rows in these slots; one program for each power of two of them."""
        size = min(1 << (len(rows) - 1).bit_length(), self._batch)
        fresh = self._read(rows, size)
        places = np.full(size, self._batch, np.int32)  # past the end, where they are dropped
        places[: len(slots)] = slots
        return put_rows_in_place(self._plan.constrained, state, places, fresh)

    def _ended(
        self, state: DecodeState, watchers: dict[int, RowWatcher]
    ) -> tuple[DecodeState, np.ndarray, list[FinishedRow]]:
        """The state in which rows with a stop string are done, all lengths, and the rows that ended.

        Those leave `watchers`.
        """
        done, lengths = to_host((state.done, state.length))
        is_done, lengths = np.array(done), np.array(lengths)
        if not is_done[list(watchers)].any() and not needs_text(self._options):
            return state, lengths, []
        tokens, logprobs, failed, layers = to_host((state.tokens, state.logprobs, state.failed, state.layer_counts.row))
        finished = []
        for slot, watcher in list(watchers.items()):
            is_done[slot] |= watcher.read(tokens[slot], int(lengths[slot]))
            if not is_done[slot]:
                continue
            watcher.finish()
            start, length, ends = watcher.prompt_length, int(lengths[slot]), self._settings.end_tokens
            end, reason = watcher.end_of(tokens[slot], length, ends, failed=bool(failed[slot]))
            new, scores = tokens[slot, start:end].copy(), logprobs[slot, start:end].copy()
            seed = int(self._settings.seeds[watcher.index])
            finished.append(FinishedRow(watcher.index, new, scores, watcher.text, reason, seed, length - end))
            self._counts.row_layers += int(layers[slot])
            del watchers[slot]
        return dataclasses.replace(state, done=state.done | is_done), lengths, finished
