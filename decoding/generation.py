"""Drives a decoding strategy from prompts to text: the host's part, outside the compiled loop.

The loop runs uninterrupted to the end unless stop strings or streaming ask for a look at the text between blocks of
tokens.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from decodax.decoding import state as decode_state
from decodax.decoding.autoregressive import Decode, autoregressive
from decodax.decoding.compile_clock import compile_seconds
from decodax.decoding.options import GenerateOptions
from decodax.decoding.state import DecodeState
from decodax.decoding.text_watcher import TextWatcher
from decodax.models.model import Model

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

STRATEGIES = {"autoregressive": autoregressive}


@dataclass(frozen=True)
class Stats:
    """What a generation took. Compiling is counted apart: the other seconds do not hold it.

    Prefill is everything up to the last prompt token's turn; decode is the loop. `tokens_per_second` is new tokens of
    all rows per decode second. `target_forwards` counts runs of the model in the loop, `prefill_forwards` those before
    it.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    prefill_forwards: int
    target_forwards: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.num_new_tokens / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Generation:
    """The continuations, one entry per prompt.

    tokens: Int32 arrays, new tokens only; a stop token that ended the row is the last one.
    text: their text without special tokens, ending before a stop string; None where the model has no tokenizer.
    logprobs: Float32 arrays, the model's own log-probability of each token (before any sampling option).
    finish_reasons: "stop" (stop token or string), "length" (max_new_tokens or the context), or "failed" (the logits
        became NaN or infinite; the tokens before that are kept).
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    logprobs: list[np.ndarray]
    finish_reasons: list[str]
    stats: Stats


@cache
def _compiled(make_decode: Any, model: Model) -> Any:
    """One jitted loop per strategy and model, so that a second call finds what the first compiled."""
    return jax.jit(make_decode(model), donate_argnums=1)


def _strategy(strategy: Any) -> Any:
    if strategy is None:
        return autoregressive
    if callable(strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)} or a function from a model, got {strategy!r}")
    return STRATEGIES[strategy]


def encode_prompts(lm: "LanguageModel", prompts: Any) -> list[np.ndarray]:
    """Token ids of one or many prompts, each text or ids; raises ValueError for what is neither, and for empty ones."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        prompts = [prompts]
    rows = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise ValueError(f"{lm.path} has no tokenizer.json: pass token ids instead of text")
            ids = np.asarray(lm.tokenizer.encode(prompt), np.int64)
        else:
            ids = np.asarray(prompt)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(f"a prompt must be a string or a list of token ids, got {prompt!r} (prompt {index})")
        if not ids.size:
            raise ValueError(f"prompt {index} is empty: it must hold at least one token")
        rows.append(ids)
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    return rows


def generate(lm: "LanguageModel", prompts: Any, options: GenerateOptions) -> Generation:
    """Runs the prompts as one batch; see `decodax.generate`."""
    rows = encode_prompts(lm, prompts)
    context = lm.config.max_position_embeddings
    for index, ids in enumerate(rows):
        if len(ids) >= context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, and the model's context of {context} leaves room for at most "
                f"{context - 1} before a new one: shorten it"
            )
    if options.stop_strings and lm.tokenizer is None:
        raise ValueError(f"{lm.path} has no tokenizer.json: use stop_token_ids instead of stop")
    ends = lm.end_token_ids if options.stop_token_ids is None else tuple(options.stop_token_ids)
    make_decode = _strategy(options.strategy)
    sampling = options.sampling(len(rows), lm.config.vocab_size, ends)
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int64)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = ids
    limits = np.minimum(options.max_new_tokens, context - lengths)

    clock = _Clock()
    state = decode_state.init(
        lm.model,
        lm.params,
        tokens,
        lengths,
        limits,
        options.seeds(len(rows)),
        sampling=sampling,
        stop_token_ids=ends,
    )
    jax.block_until_ready(state.length)
    prefill_seconds = clock.lap()
    prefill_forwards = int(state.num_target_forwards)
    watcher = TextWatcher(lm, options, rows)
    state = _decode(_compiled(make_decode, lm.model), lm.params, state, watcher)
    jax.block_until_ready(state.length)
    decode_seconds = clock.lap()
    return _result(lm, state, watcher, clock, (prefill_seconds, decode_seconds, prefill_forwards))


class _Clock:
    """Laps of wall-clock time without what went into compiling."""

    def __init__(self) -> None:
        self.compiled = 0.0
        self._start, self._compile_start = time.perf_counter(), compile_seconds()

    def lap(self) -> float:
        now, compile_now = time.perf_counter(), compile_seconds()
        wall, compiled = now - self._start, compile_now - self._compile_start
        self._start, self._compile_start = now, compile_now
        self.compiled += compiled
        return max(wall - compiled, 0.0)


def _decode(decode: Decode, params: Any, state: DecodeState, watcher: TextWatcher) -> DecodeState:
    """Runs the loop to its end, at once or in blocks with a look at the text after each."""
    block = watcher.options.block_tokens if watcher.needed else np.iinfo(np.int32).max
    while not bool(jnp.all(state.done)):
        state = decode(params, state, np.int32(block))
        state = dataclasses.replace(state, done=state.done | jnp.asarray(watcher.look(state)))
    watcher.finish()
    return state


def _result(
    lm: "LanguageModel", state: DecodeState, watcher: TextWatcher, clock: "_Clock", times: tuple[float, float, int]
) -> Generation:
    """Cuts each row's new tokens out of the final state."""
    prefill_seconds, decode_seconds, prefill_forwards = times
    tokens, logprobs, lengths = (np.asarray(x) for x in (state.tokens, state.logprobs, state.length))
    failed, stop_ids = np.asarray(state.failed), np.asarray(state.stop_token_ids)
    new, scores, reasons = [], [], []
    for row, start in enumerate(watcher.prompt_lengths):
        kept = watcher.num_kept[row]
        end = int(lengths[row] if kept is None else start + kept)
        new.append(tokens[row, start:end].copy())
        scores.append(logprobs[row, start:end].copy())
        ended = kept is not None or (end > start and tokens[row, end - 1] in stop_ids[row])
        reasons.append("failed" if failed[row] else "stop" if ended else "length")
    stats = Stats(
        num_prompt_tokens=int(np.sum(watcher.prompt_lengths)),
        num_new_tokens=int(np.sum(lengths - watcher.prompt_lengths)),
        prefill_forwards=prefill_forwards,
        target_forwards=int(state.num_target_forwards) - prefill_forwards,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=clock.compiled,
    )
    return Generation(new, None if lm.tokenizer is None else watcher.text, scores, reasons, stats)
