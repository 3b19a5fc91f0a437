"""Generates text from prompts on the host, outside the compiled decoding loop: `decodax.generate`.

The loop runs to the end in calls of about half a second, between which Python can raise KeyboardInterrupt. For stop
strings and streaming, the host also reads the text between blocks of tokens.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from decodax.decoding.chunked_prefill import prefill
from decodax.decoding.generated import Generation, Stats
from decodax.decoding.options import GenerateOptions
from decodax.decoding.pace import Pace
from decodax.decoding.prompts import check_context, encode_prompts
from decodax.decoding.ready_strategy import ReadyStrategy
from decodax.decoding.refilled import Settings, generate_refilled
from decodax.decoding.rows import repeat_rows
from decodax.decoding.running import UNLIMITED, Clock, decode_block, draft_counts_of, kernels_of
from decodax.decoding.sizes import cache_capacity, check_step_fits
from decodax.decoding.state import DecodeState
from decodax.decoding.text_watcher import TextWatcher
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message
from decodax.sharding.host import assert_same_on_all_processes, spans_processes, to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

_MANY_LAYERS = 12  # from which on the prompts' program and the loop are compiled side by side


def generate(lm: "LanguageModel", prompts: Any, options: GenerateOptions) -> Generation:
    """Runs the prompts as one batch; see `decodax.generate`."""
    rows = encode_prompts(lm, prompts, options.chat_options)
    context = lm.config.max_position_embeddings
    for index, ids in enumerate(rows):
        check_context(lm, f"prompt {index}", ids)
    if options.stop_strings and lm.tokenizer is None:
        raise ValueError(no_tokenizer_message(lm.path, "use stop_token_ids instead of stop"))
    ends = options.end_tokens(lm.end_token_ids, lm.config.vocab_size)
    seeds = options.sample_seeds(len(rows))
    if spans_processes(lm.model.execution.mesh):
        assert_same_on_all_processes(lm.model.execution.mesh, _run_fingerprint(lm, rows, options))
    sampling = options.sampling(len(rows), lm.config.vocab_size, ends)
    if options.batch_size is not None and len(seeds) > options.batch_size:
        return generate_refilled(
            lm, rows, options, Settings(seeds, sampling, ends, np.full(len(rows), options.max_new_tokens))
        )
    plan = ReadyStrategy(lm, options, len(seeds))
    check_step_fits(lm.model, len(seeds), plan.step_tokens, plan.num_logits_arrays(sampling))
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int64)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = ids
    limits = np.minimum(min(options.max_new_tokens, context), context - lengths)

    clock = Clock()
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


def _decode(plan: ReadyStrategy, state: DecodeState, watcher: TextWatcher, pace: Pace) -> DecodeState:
    """Runs the loop to its end; for stop strings and streaming in blocks, after each of which the text is read."""
    block = watcher.options.block_tokens if watcher.needed else UNLIMITED
    while not bool(jnp.all(state.done)):
        state = decode_block(plan, state, block, pace)
        if watcher.needed:
            state = dataclasses.replace(state, done=state.done | watcher.look(state))
    watcher.look(state)
    watcher.finish()
    return state


def _result(
    lm: "LanguageModel",
    state: DecodeState,
    watcher: TextWatcher,
    plan: ReadyStrategy,
    clock: "Clock",
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
        end, reason = watcher.rows[row].end_of(
            tokens[row], int(lengths[row]), stop_ids[row].tolist(), failed=bool(failed[row])
        )
        new.append(tokens[row, start:end].copy())
        scores.append(logprobs[row, start:end].copy())
        reasons.append(reason)
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
        kernels=kernels_of(lm, plan, state, int(watcher.prompt_lengths.max())),
        **draft_counts_of(state),
    )
    text = None if lm.tokenizer is None else [row.text or "" for row in watcher.rows]
    return Generation(new, text, scores, reasons, seeds.tolist(), stats)
