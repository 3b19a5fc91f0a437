"""Generates text from prompts on the host, outside the compiled decoding loop: `decodax.generate`.

The loop runs to the end in calls of about half a second, between which Python can raise KeyboardInterrupt. For stop
strings and streaming, the host also reads the text between blocks of tokens.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS, prefill
from decodax.decoding.compile_clock import compile_seconds
from decodax.decoding.options import GenerateOptions
from decodax.decoding.pace import Pace
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.ready_strategy import ReadyStrategy
from decodax.decoding.rows import repeat_rows
from decodax.decoding.sizes import cache_capacity, check_step_fits, chunk_tokens
from decodax.decoding.state import DecodeState
from decodax.decoding.text_watcher import TextWatcher
from decodax.models.layer_kernels import LayerKernel, layer_kernels
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message
from decodax.sharding.host import assert_same_on_all_processes, spans_processes, to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_UNLIMITED = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Stats:
    """Counts and times of a generation. Prefill ends before the last prompt token and includes the draft's prefill.

    prefill_forwards: runs of the model before the decode loop.
    target_forwards: runs of the model in the loop.
    prefill_seconds, decode_seconds: without compiling; decode is the loop.
    compile_seconds: compiling, counted apart.
    strategy: its name, or the classes of a drafter and a verifier passed as a `Speculation`.
    num_layers: of the model.
    layer_forwards: runs of single layers of it in the loop, by target or drafter; a layer that one row of a batch
        needs runs for all.
    row_layers: the layers that each row needed, summed over the rows.
    num_cut_tokens: what the loop decoded after a stop string, which is not in the result.
    fallback: why plain decoding replaced the strategy, None where it did not.
    kernels: what ran in the layers, in prefill and in decoding, and why.
    draft_forwards: runs of a drafter's own network in the loop.
    accepted_lengths[n]: how often one forward of the model gave a row n draft tokens and one of its own; where a stop
        token or the row's limit cuts a round short, the last token counts as the model's. So new tokens and those cut
        off are exactly the sum of (n + 1) accepted_lengths[n].
    proposed[d]: how often the target verified a draft token at position d + 1 (those before it were accepted).
    accepted[d]: how often it accepted that token (in a tree: one of them).
    """

    num_prompt_tokens: int
    num_new_tokens: int
    prefill_forwards: int
    target_forwards: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    strategy: str
    num_layers: int
    layer_forwards: int
    row_layers: int
    num_cut_tokens: int = 0
    fallback: str | None = None
    kernels: tuple[LayerKernel, ...] = ()
    draft_forwards: int = 0
    accepted_lengths: tuple[int, ...] = ()
    proposed: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per row and forward of the model; 1 for plain decoding."""
        rounds = sum(self.accepted_lengths)
        return self._num_decoded / rounds if rounds else 1.0

    @property
    def tokens_per_full_forward(self) -> float:
        """Tokens decoded per row and `num_layers` layer runs (the cost of one full forward); 1 for plain decoding."""
        return self._num_decoded * self.num_layers / self.row_layers if self.row_layers else 1.0

    @property
    def _num_decoded(self) -> int:
        return self.num_new_tokens + self.num_cut_tokens

    @property
    def acceptance_per_position(self) -> tuple[float | None, ...]:
        """accepted / proposed for each position of a draft, None where none was ever proposed."""
        counts = zip(self.accepted, self.proposed, strict=True)
        return tuple(accepted / proposed if proposed else None for accepted, proposed in counts)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.num_new_tokens / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Generation:
    """The generated text, one entry per prompt, or per sample: all of the first prompt, then those of the second.

    tokens: Int32 arrays, new tokens only; a stop token that ended the row is the last one.
    text: text of the tokens without special ones, up to a stop string; None where the model has no tokenizer.
    logprobs: Float32 arrays, the model's own log-probability of each token (before any sampling option).
    finish_reasons: "stop" (stop token or string), "length" (max_new_tokens or the context), or "failed" (the logits
        became NaN or infinite; the tokens before that are kept).
    seeds: of each row; with `seed=[its seed]` a prompt alone draws the same tokens.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    logprobs: list[np.ndarray]
    finish_reasons: list[str]
    seeds: list[int]
    stats: Stats


_MANY_LAYERS = 12  # from which on the prompts' program and the loop are compiled side by side


def generate(lm: "LanguageModel", prompts: Any, options: GenerateOptions) -> Generation:
    """Runs the prompts as one batch; see `decodax.generate`."""
    rows = encode_prompts(lm, prompts, options.chat_options)
    context = lm.config.max_position_embeddings
    for index, ids in enumerate(rows):
        if len(ids) >= context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, and the model's context of {context} leaves room for at most "
                f"{context - 1} before a new one: shorten it"
            )
    if options.stop_strings and lm.tokenizer is None:
        raise ValueError(no_tokenizer_message(lm.path, "use stop_token_ids instead of stop"))
    ends = options.end_tokens(lm.end_token_ids, lm.config.vocab_size)
    seeds = options.sample_seeds(len(rows))
    if spans_processes(lm.model.execution.mesh):
        assert_same_on_all_processes(lm.model.execution.mesh, _run_fingerprint(lm, rows, options))
    sampling = options.sampling(len(rows), lm.config.vocab_size, ends)
    plan = ReadyStrategy(lm, options, len(seeds))
    check_step_fits(lm.model, len(seeds), plan.step_tokens, plan.num_logits_arrays(sampling))
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int64)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = ids
    limits = np.minimum(min(options.max_new_tokens, context), context - lengths)

    clock = _Clock()
    prompts_of = partial(
        prefill,
        lm.model,
        plan.params,
        seed=seeds[:: options.n],
        sampling=sampling,
        stop_token_ids=ends,
        layer_policy=plan.layer_policy,
    )
    if lm.config.num_layers >= _MANY_LAYERS and lm.model.execution.mesh is None and options.n == 1:
        # Of prompts of one token nothing runs; with as many tokens in all, the state has the same shapes.
        one = np.ones_like(lengths)
        capacity = cache_capacity(int(np.max(lengths + limits)), lm.model.execution)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), sampling)
        sizes = (len(seeds), capacity, len(ends), str(lm.dtype), str(shapes))
        plan.compile_ahead(sizes, lambda: prompts_of(tokens[:, :1], one, lengths + limits - one))
    state = prompts_of(tokens, lengths, limits)
    samples = [ids for ids in rows for _ in range(options.n)]
    state = plan.start(state)
    state = state if options.n == 1 else repeat_rows(state, seeds, plan.constrained)
    jax.block_until_ready(state)
    prefill_seconds = clock.lap()
    prefill_forwards = int(state.num_target_forwards)
    watcher = TextWatcher(lm, options, samples)
    pace = Pace(lm.model.execution.mesh, prefill_seconds / max(prefill_forwards, 1))
    state = _decode(plan, state, watcher, pace)
    jax.block_until_ready(state.length)
    decode_seconds = clock.lap()
    times = (prefill_seconds, decode_seconds, prefill_forwards)
    return _result(lm, state, watcher, plan, clock, times, int(lengths.sum()))


def _run_fingerprint(lm: "LanguageModel", rows: list[np.ndarray], options: GenerateOptions) -> dict[str, str | bytes]:
    """The arguments that all processes of a run must have in common, by name.

    Of a strategy or a draft that is an object only its kind is compared. Streaming is compared because the text is
    read between blocks of tokens, so processes that stream run other programs than those that do not.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    strategy = values.pop("strategy")
    arguments = {name: str(values.pop(name) is not None) for name in ("draft", "on_text")}
    arguments["logits_processors"] = repr([processor.name for processor in values.pop("logits_processors")])
    arguments |= {name: repr(value) for name, value in values.items()}
    arguments["strategy"] = strategy if isinstance(strategy, str) else type(strategy).__name__
    prompts = b";".join(ids.astype(np.int64).tobytes() for ids in rows)
    return {"model": repr(lm.config), "prompts": prompts, **arguments}


class _Clock:
    """Laps of wall-clock time without the time of compiling."""

    def __init__(self) -> None:
        self.compiled = 0.0
        self._start, self._compile_start = time.perf_counter(), compile_seconds()

    def lap(self) -> float:
        now, compile_now = time.perf_counter(), compile_seconds()
        wall, compiled = now - self._start, compile_now - self._compile_start
        self._start, self._compile_start = now, compile_now
        self.compiled += compiled
        return max(wall - compiled, 0.0)


def _decode(plan: ReadyStrategy, state: DecodeState, watcher: TextWatcher, pace: Pace) -> DecodeState:
    """Runs the loop to its end; for stop strings and streaming in blocks, after each of which the text is read."""
    block = watcher.options.block_tokens if watcher.needed else _UNLIMITED
    while not bool(jnp.all(state.done)):
        state = _decode_block(plan, state, block, pace)
        if watcher.needed:
            state = dataclasses.replace(state, done=state.done | watcher.look(state))
    watcher.look(state)
    watcher.finish()
    return state


def _decode_block(plan: ReadyStrategy, state: DecodeState, max_tokens: int, pace: Pace) -> DecodeState:
    """Runs the loop until all rows are done or one has `max_tokens` more, in calls short enough for Ctrl-C.

    The length of the calls does not change the result: each continues from the state in which the last one stopped.
    """
    begin, left, done = to_host(state.length), max_tokens, False
    while left > 0 and not done:
        with pace.measured(left) as tokens:
            state = plan.decode(state, np.int32(tokens))
            lengths, rows_done = to_host((state.length, state.done))
        left, done = max_tokens - int(np.max(lengths - begin)), bool(np.all(rows_done))
    return state


def _result(
    lm: "LanguageModel",
    state: DecodeState,
    watcher: TextWatcher,
    plan: ReadyStrategy,
    clock: "_Clock",
    times: tuple[float, float, int],
    num_prompt_tokens: int,
) -> Generation:
    """Cuts each row's new tokens out of the final state."""
    prefill_seconds, decode_seconds, prefill_forwards = times
    end_state = (state.tokens, state.logprobs, state.length, state.failed, state.stop_token_ids, state.seed)
    tokens, logprobs, lengths, failed, stop_ids, seeds = to_host(end_state)
    layer_counts = to_host(state.layer_counts)
    new, scores, reasons = [], [], []
    for row, start in enumerate(watcher.prompt_lengths):
        kept = watcher.num_kept[row]
        end = int(lengths[row] if kept is None else start + kept)
        new.append(tokens[row, start:end].copy())
        scores.append(logprobs[row, start:end].copy())
        ended = kept is not None or (end > start and tokens[row, end - 1] in stop_ids[row])
        reasons.append("failed" if failed[row] else "stop" if ended else "length")
    num_new = sum(map(len, new))
    stats = Stats(
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new,
        prefill_forwards=prefill_forwards,
        target_forwards=int(state.num_target_forwards) - prefill_forwards,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=clock.compiled,
        strategy=plan.name,
        num_layers=lm.config.num_layers,
        layer_forwards=int(layer_counts.batch),
        row_layers=int(np.sum(layer_counts.row)),
        num_cut_tokens=int(np.sum(lengths - watcher.prompt_lengths)) - num_new,
        fallback=plan.fallback,
        kernels=_kernels(lm, plan, state, int(watcher.prompt_lengths.max())),
        **_draft_counts(state),
    )
    text = None if lm.tokenizer is None else watcher.text
    return Generation(new, text, scores, reasons, seeds.tolist(), stats)


def _kernels(
    lm: "LanguageModel", plan: ReadyStrategy, state: DecodeState, prompt_tokens: int
) -> tuple[LayerKernel, ...]:
    batch, capacity = state.tokens.shape
    chunk = chunk_tokens(prompt_tokens, MAX_CHUNK_TOKENS, lm.model.execution)
    return layer_kernels(lm.model, lm.dtype, batch, chunk, plan.step_tokens, capacity)


def _draft_counts(state: DecodeState) -> dict[str, Any]:
    """The counts of drafts as plain numbers, none for a strategy that does not draft."""
    if state.counts is None:
        return {}
    counts = to_host(state.counts)
    return {
        "draft_forwards": int(counts.num_draft_forwards),
        "accepted_lengths": tuple(map(int, counts.accepted_lengths)),
        "proposed": tuple(map(int, counts.proposed)),
        "accepted": tuple(map(int, counts.accepted)),
    }
