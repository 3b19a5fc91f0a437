"""Provides the functions most users need: load a model, generate with it, read its logits, score texts."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Never

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax import program_cache
from decodax.core.arguments import choice, flag, folder_name, instance, shown, whole_number
from decodax.decoding.adapted import adapter_list, split_adapters, with_adapter
from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.decoding.generated import Generation
from decodax.decoding.generation import generate as _generate
from decodax.decoding.options import GenerateOptions
from decodax.decoding.programs import bounded_jit
from decodax.decoding.scoring import Score
from decodax.decoding.scoring import score as _score
from decodax.decoding.strategies import Speculation, Strategy
from decodax.kernels_pallas.selection import IMPLEMENTATIONS, Implementation
from decodax.layers.execution import Execution
from decodax.models.load import LanguageModel, find_folder, working_dtype
from decodax.models.load import load as _load
from decodax.models.model import Model, Params
from decodax.sharding.pipeline import ONE_CHUNK, Pipeline
from decodax.sharding.rules import RULES, Rules

__all__ = ["Generation", "LanguageModel", "Score", "generate", "load", "logits", "score"]

Messages = Sequence[Mapping[str, Any]]
Ids = Sequence[int] | Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray | Array
Prompts = str | Sequence[str] | Ids | Messages | Sequence[Messages]
TextsOrIds = str | Sequence[str] | Ids | Sequence[str | Sequence[int] | np.ndarray | Array]
PerPrompt = float | Sequence[float | None] | np.ndarray | Array | None


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    rules: Rules | None = RULES,
    invariant: bool | None = False,
    adapter: str | os.PathLike[str] | AuxiliaryWeights | Sequence[Any] | None = None,
    implementation: Implementation | None = None,
    sequence_parallel: bool | None = False,
    pipeline: Pipeline | None = ONE_CHUNK,
    compilation_cache: bool | None = True,
    abstract: bool | None = False,
) -> LanguageModel:
    """Loads a model folder in Hugging Face format (config.json, safetensors, tokenizer.json) or with Orbax, or GGUF.

    path_or_id: a folder; a GGUF file, or one of the files of a split one; the id of a model on the Hugging Face hub
        ("org/name"), which is downloaded once; None for the small model that decodax carries.
    dtype: "float32", "bfloat16" or "float16", in which the weights are kept; by default float32 on CPU (where bfloat16
        is many times slower) and bfloat16 on accelerators.
    mesh: the devices to run on, as a text like "tensor=4,data=2" or a JAX mesh with such axes (data, pipeline, context,
        expert, tensor); by default the first device. Weights are read straight to their devices.
    rules: how weights and caches are sharded over the mesh (`sharding.rules`); the default serves every such mesh.
    invariant: give a token the same logits, to the last bit, alone and in a draft, so that speculative decoding gives
        plain decoding's tokens in every dtype; slower (`Model.invariant`).
    adapter: a LoRA adapter to merge into the weights, or several, merged in order: the folder of each (as the PEFT
        library writes it: adapter_config.json with adapter_model.safetensors), or its name inside the model's folder.
        The last may be one made by `decodax train layer_skip`.
    implementation: which kernels the layers run, "xla", "tpu" or "gpu" (`kernels_pallas/selection.py`); by default
        those of this device where supported, and XLA for the rest. `decodax bench --kernels` shows the selection.
    sequence_parallel: on a mesh with an axis "tensor", let each device normalise its share of the tokens (`Execution`);
        the all-reduces become reduce-scatters and all-gathers.
    pipeline: on a mesh with an axis "pipeline", how many chunks each stage's layers are split into, and how many
        micro-batches the rows (`sharding.pipeline.Pipeline`).
    compilation_cache: keep compiled programs for the next start, in the user's cache folder, at most a gigabyte;
        `jax.config` and JAX's environment variables win. It holds for all that this process compiles.
    abstract: a dry run: check the names and shapes of the files, read no numbers, and give `params` of shapes, dtypes
        and shardings (`jax.ShapeDtypeStruct`). A folder with config.json alone will do.
    None for any of them means that it is not given.
    Raises FileNotFoundError when there is no such folder or it lacks a file.
    Raises ConnectionError when a download is needed and not possible.
    Raises ValueError for files that do not fit or are not understood, and for a mesh that does not fit the devices or
    the model.
    Raises NotImplementedError, with every reason, where the kernels of `implementation` do not fit the model's layers.
    """
    path = None if path_or_id is None else folder_name("path_or_id", path_or_id, ", or the id of a model on the hub")
    known_mesh = "a text like 'tensor=4,data=2' or a jax.sharding.Mesh"
    options: Any = {
        "mesh": None if mesh is None else instance("mesh", mesh, str | Mesh, known_mesh),
        "rules": RULES if rules is None else instance("rules", rules, Rules, "decodax.sharding.rules.Rules"),
        "invariant": invariant is not None and flag("invariant", invariant),
        "implementation": None if implementation is None else choice("implementation", implementation, IMPLEMENTATIONS),
        "abstract": abstract is not None and flag("abstract", abstract),
        "sequence_parallel": sequence_parallel is not None and flag("sequence_parallel", sequence_parallel),
        "pipeline": ONE_CHUNK
        if pipeline is None
        else instance("pipeline", pipeline, Pipeline, "decodax.sharding.pipeline.Pipeline"),
    }
    if compilation_cache is None or flag("compilation_cache", compilation_cache):
        program_cache.use()
    kind, last = working_dtype(dtype), None
    if adapter is not None and (several := adapter_list(adapter)):
        options["adapters"], last = split_adapters(several, find_folder(path))
    lm = _load(path, dtype=kind, **options)
    _warn_of_idle_options(lm.model.execution)
    if last is None:
        return lm
    lm.require_weights()
    return with_adapter(lm, last)


def _warn_of_idle_options(execution: Execution) -> None:
    """Warns where an option for devices changes nothing on this mesh, or without one."""
    axes = () if execution.mesh is None else execution.mesh.axis_names
    idle = {
        "rules": execution.rules is not RULES and execution.mesh is None,
        "sequence_parallel": execution.sequence_parallel and "tensor" not in axes,
        "pipeline": execution.pipeline != ONE_CHUNK and "pipeline" not in axes,
    }
    needs = {"rules": "a mesh", "sequence_parallel": "a mesh axis 'tensor'", "pipeline": "a mesh axis 'pipeline'"}
    for name in (name for name, is_idle in idle.items() if is_idle):
        warnings.warn(f"{name} changes nothing here, as it needs {needs[name]}: see `mesh`", stacklevel=3)


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    *,
    n: int | None = 1,
    max_new_tokens: int | None = 128,
    stop: str | Sequence[str] | None = (),
    stop_token_ids: Sequence[int] | None = None,
    temperature: PerPrompt = None,
    top_k: PerPrompt = None,
    top_p: PerPrompt = None,
    min_p: PerPrompt = None,
    typical_p: PerPrompt = None,
    repetition_penalty: PerPrompt = None,
    presence_penalty: PerPrompt = None,
    frequency_penalty: PerPrompt = None,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None = None,
    min_new_tokens: PerPrompt = None,
    logits_processors: Callable[..., Array] | Sequence[Callable[..., Array]] | None = (),
    seed: int | Sequence[int | None] | None = 0,
    strategy: str | Strategy | Speculation | Callable[..., Any] | None = None,
    draft: str | os.PathLike[str] | LanguageModel | AuxiliaryWeights | None = None,
    draft_tokens: int | Literal["auto"] | None = None,
    on_text: Callable[[int, str], Any] | None = None,
    block_tokens: int | None = 16,
    batch_size: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool | None = False,
    **misspelt: Never,
) -> Generation:
    """Continues one or more prompts, text, messages or token ids, as one batch. Greedy unless a temperature is given.

    A prompt is a text, a list of token ids, or a list of messages, `[{"role": "user", "content": "..."}]`, which the
    model's chat template turns into text that ends where the answer begins. `prompts` is one prompt or a list of them,
    and a list's first entry tells which: an integer makes it the ids of one prompt, a mapping the messages of one
    conversation, and anything else many prompts, which may be of different kinds.

    Options marked * take one value, or one per prompt. None means that an option is not given.

    n: samples of each prompt, which is prefilled once. The result has all samples of the first prompt, then those of
        the second.
    max_new_tokens: most tokens to add to each prompt; fewer where the model's context ends, so any number however large
        means to its end.
    stop: a string or several; a row ends where one appears, and the text ends before it.
    stop_token_ids: token ids that end a row; None means the model's own end tokens, [] none.
    temperature *: Sample at this temperature; 0, the default, always takes the most probable token.
    top_k *: Sample among the k most probable tokens; 0 or -1 is off.
    top_p *: Sample among the fewest most probable tokens with this probability in all; 1 is off.
    min_p *: Sample among tokens with at least this share of the largest probability; 0 is off.
    typical_p *: Sample among the most typical tokens with this probability in all; 1 is off.
    repetition_penalty *: Lower the logits of tokens in the prompt or the output; 1 is off.
    presence_penalty *: Lower the logits of tokens in the output, once; 0 is off.
    frequency_penalty *: Lower the logits of tokens in the output, per occurrence; 0 is off.
    logit_bias *: Add numbers to the logits of tokens: {token id: number}.
    min_new_tokens *: Forbid end tokens before so many new tokens; 0 is off.
    logits_processors: one's own, one or several: functions `(logits, history) -> logits` that may look at the tokens so
        far (`decoding.logits_processors.History`), or `LogitsProcessor` objects. They run before the temperature, also
        at every node of a draft.
    seed *: a whole number, taken modulo 2**32. One number is the seed of the first prompt; every further prompt, and
        every further sample of one, has a seed of its own, which follows from it and from their places
        (`Generation.seeds`). With seeds for each prompt, a prompt draws the same tokens in any batch.
    strategy: how tokens are found: a name that `decodax methods` lists (None: "autoregressive"), with options as in
        "medusa:24,epsilon=0.1"; an object of its class; a `Speculation` made of a drafter and a verifier; or a function
        from a model to a `decode(params, state, max_tokens)`.
    draft: the draft model or the auxiliary weights of a strategy that has some: a folder, a hub id or a loaded model;
        None for what comes with the embedded model.
    draft_tokens: tokens per draft (in a tree: nodes after the root); None for the strategy's default; "auto" lets a
        strategy that can choose by measured times, and fall back to plain decoding, with a warning, where none pays.
    on_text: called as `on_text(row, piece)` with new text as blocks of tokens arrive (streaming).
    block_tokens: tokens between two looks at the output, where stop strings, `on_text` or `batch_size` need them.
    batch_size: rows that run at once, however many prompts there are; a row that ends is refilled with the next prompt.
        None: all in one batch.
    tools: for conversations: JSON schemas of functions that the model may call.
    documents: for conversations: mappings with "title" and "text", that the answer is to rest on.
    chat_template: for conversations: a template of Jinja, or the name of one of the model's; None for the usual one.
    chat_template_kwargs: for conversations: further values that the template asks for ({"enable_thinking": False}).
    continue_final_message: for conversations: continue the last message instead of answering it.

    Returns a `Generation` with lists `.tokens`, `.text`, `.logprobs`, `.finish_reasons` and `.seeds` (one entry per
    prompt, or per sample of one), and `.stats`.
    Raises TypeError for an option that does not exist.
    Raises ValueError for values and prompts that cannot be run.
    Raises MemoryError when the cache would not fit.

    >>> import decodax
    >>> lm = decodax.load()
    >>> out = decodax.generate(lm, "def fibonacci(n):", max_new_tokens=8)
    >>> len(out.tokens[0])
    8
    """
    options = {name: value for name, value in locals().items() if name not in ("lm", "prompts", "misspelt")}
    _check_model(lm)
    lm.require_weights()
    return _generate(lm, prompts, GenerateOptions.read(options | misspelt))


def _check_model(lm: Any) -> None:
    instance("lm", lm, LanguageModel, "a model as decodax.load gives it")


def logits(
    lm: LanguageModel, tokens: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]]
) -> Float[Array, "B T V"]:
    """Next-token logits in float32 after every token of full rows (no padding).

    Raises ValueError for another shape, ids outside the vocabulary or rows longer than the context.
    """
    _check_model(lm)
    lm.require_weights()
    try:
        rows = np.asarray(tokens)
    except Exception as error:  # rows of different lengths, or no numbers
        raise ValueError(f"tokens must be whole numbers of shape [B, T], got {shown(tokens)}") from error
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "iu":
        raise ValueError(f"tokens must be whole numbers of shape [B, T], got {rows.dtype} of shape {rows.shape}")
    if rows.min() < 0 or rows.max() >= lm.config.vocab_size:
        raise ValueError(f"token ids must be in 0..{lm.config.vocab_size - 1}, got {rows.min()}..{rows.max()}")
    if rows.shape[1] > lm.config.max_position_embeddings:
        raise ValueError(
            f"rows must hold at most {lm.config.max_position_embeddings} tokens (the model's context), "
            f"got {rows.shape[1]}"
        )
    return _logits(lm.model, lm.params, rows.astype(np.int32))


@bounded_jit(static_argnums=(0,))
def _logits(model: Model, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    row_length = jnp.full(tokens.shape, tokens.shape[1], jnp.int32)
    return model.logits(params, model.apply(params, tokens, position, row_length=row_length).hidden)


def score(
    lm: LanguageModel,
    prompts: TextsOrIds,
    continuations: TextsOrIds,
    *,
    per_token: bool | None = False,
    batch_size: int | None = 16,
) -> list[Score]:
    """The log-probability of each continuation after its prompt, and whether greedy decoding would write it.

    A prompt or a continuation is a text or a list of token ids, one of each or a list of as many of both. A text is
    encoded together with its prompt, and white space between them counts as the continuation's, as in
    lm-evaluation-harness. The tokenizer's start token comes before a prompt that is a text, and is all of an empty one.

    per_token: give the log-probability of each token as well.
    batch_size: rows that run at a time, those of similar length together; results do not depend on it but by rounding.
    None for either means that it is not given.

    Returns a `Score` per prompt: `.logprob` (in nats), `.num_tokens`, `.is_greedy` and `.token_logprobs`.
    Raises ValueError, with the index, for what is no text or list of ids, for different counts, an empty continuation,
    an empty prompt where the tokenizer has no start token, ids outside the vocabulary, and texts beyond the context.
    Raises MemoryError when the cache would not fit.

    >>> import decodax
    >>> lm = decodax.load()
    >>> right, wrong = decodax.score(lm, ["for i in"] * 2, [" range(", " banana("])
    >>> right.logprob > wrong.logprob
    True
    """
    _check_model(lm)
    lm.require_weights()
    return _score(
        lm,
        prompts,
        continuations,
        per_token=per_token is not None and flag("per_token", per_token),
        batch_size=16 if batch_size is None else whole_number("batch_size", batch_size, least=1),
    )
