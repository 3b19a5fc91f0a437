"""`decodax generate`: continues prompts, and streams the text as it comes."""

import dataclasses
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

import decodax
from decodax.cli import chat as chats
from decodax.cli import hosts, prompt_files, session
from decodax.cli.prompts import as_text, read_prompts
from decodax.cli.signatures import insert_options
from decodax.decoding.generated import Generation, Stats
from decodax.decoding.logits_processors import METHODS as PROCESSORS
from decodax.decoding.options import GenerateOptions
from decodax.decoding.ready_strategy import strategy_from_text
from decodax.decoding.strategies import METHODS as STRATEGIES

_DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(GenerateOptions)}


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to continue, as one batch; - is stdin.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="A file with one prompt, whole (may be repeated); - is stdin.")
    ] = None,
    source: prompt_files.Input = None,
    target: prompt_files.Output = None,
    batch_size: prompt_files.BatchSize = None,
    chat: chats.Chat = False,
    system: chats.System = None,
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    mesh: session.MeshName = None,
    distributed: hosts.Coordinator = None,
    num_processes: hosts.NumProcesses = None,
    process_id: hosts.ProcessId = None,
    join_timeout: hosts.JoinTimeout = hosts.JOIN_TIMEOUT,
    invariant: session.Invariant = False,
    adapter: session.Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add to each prompt.")] = _DEFAULT[
        "max_new_tokens"
    ],
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (may be repeated).")] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID...", help="End after these tokens; '' for none. Default: the model's.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Samples of each prompt.")] = _DEFAULT["n"],
    seed: Annotated[int, typer.Option(help="Another seed draws another text.")] = _DEFAULT["seed"],
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:VALUE][,option=value]",
            help=f"How to find tokens: {', '.join(STRATEGIES)}. `decodax methods` lists the options of each.",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Auxiliary weights or draft model of a strategy: a folder or hub id. Default: the embedded ones."
        ),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens per draft, or auto. Default: the strategy's.")
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens between two pieces of streamed text.")] = (
        _DEFAULT["block_tokens"]
    ),
    tools: chats.Tools = None,
    documents: chats.Documents = None,
    chat_template: chats.Template = None,
    chat_template_kwargs: chats.TemplateValues = None,
    compilation_cache: Annotated[
        bool, typer.Option(help="Keep compiled programs for the next run, in the user's cache folder.")
    ] = True,
    as_json: session.Json = False,
    debug: session.Debug = False,
    **processors: Any,
) -> None:
    """Continue prompts with a language model, or answer them (--chat).

    One prompt is streamed to stdout as it is written, several follow one another when all are done. A line of
    statistics goes to stderr. Prompts that begin with - come after the options and a --.

    Example: decodax generate "def fibonacci(n):" --max-new-tokens 64
    """
    with session.reported_errors(debug):
        options = _options(
            max_new_tokens=max_new_tokens,
            **_read_processors(processors),
            stop=tuple(as_text(text, "a stop text") for text in stop or ()),
            stop_token_ids=_read_ids(stop_token_ids),
            n=n,
            seed=seed,
            strategy=_check_strategy(strategy, _read_draft_tokens(draft_tokens)),
            draft=draft,
            draft_tokens=_read_draft_tokens(draft_tokens),
            block_tokens=block_tokens,
            batch_size=batch_size,
            **chats.read_options(chat, system, tools, documents, chat_template, chat_template_kwargs),
        )
        prompt_files.check(source, target, [*(prompts or []), *(file or [])], n, distributed is not None)
        texts = [] if source is not None else read_prompts(prompts or [], file or [])
        before = None if system is None else as_text(system, "--system")
        with hosts.rendezvous(distributed, num_processes, process_id, join_timeout, mesh):
            lm = decodax.load(
                model,
                dtype=dtype,
                mesh=mesh,
                invariant=invariant,
                adapter=adapter,
                compilation_cache=compilation_cache,
            )
            _check_values(lm, options, len(texts) or 1)
            if source is not None and target is not None:
                prompt_files.run(lm, source, target, options, chat=chat, system=before)
                return
            asked = chats.conversations(texts, before)
            _run(lm, texts, asked if chat else texts, options, as_json)


def _processor_options() -> list[inspect.Parameter]:
    """An option for each logits processor; of one that takes no number, "id=value" texts."""
    options = []
    for name, method in PROCESSORS.items():
        if method.number is None:
            kind: Any = Annotated[list[str] | None, typer.Option(help=method.help, metavar="ID=VALUE")]
        else:
            kind = Annotated[method.number | None, typer.Option(help=method.help)]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    return options


insert_options(generate, _processor_options(), after="max_new_tokens")


def _read_processors(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _read_biases(name, option) if PROCESSORS[name].number is None else option
        for name, option in options.items()
    }


def _run(
    lm: decodax.LanguageModel, texts: list[str], prompts: list[Any], options: dict[str, Any], as_json: bool
) -> None:
    """Generates and prints; raises ArithmeticError, after that, where a row failed.

    texts: those that the user gave.
    prompts: what the model is given: the texts themselves, or conversations with them.
    """
    is_chat = prompts is not texts
    if as_json:
        out = _generate_quietly(lm, prompts, options)
        _print_json(lm, texts, out)
    else:
        samples = [text for text in texts for _ in range(options["n"])]
        if len(samples) == 1:
            out = _stream(lm, "" if is_chat else texts[0], prompts[0], options)
        else:
            out = _generate_quietly(lm, prompts, options)
            before = [session.bold(text) + "\n" * is_chat for text in samples]
            print("\n\n".join(text + new for text, new in zip(before, out.text or (), strict=True)))
        print(_summary(out.stats, out.finish_reasons), file=sys.stderr)
    failed = [str(row) for row, reason in enumerate(out.finish_reasons) if reason == "failed"]
    if failed:
        raise ArithmeticError(f"the logits became NaN or infinite in row {', '.join(failed)} (counted from 0)")


def _options(**options: Any) -> dict[str, Any]:
    """The options, once the library has accepted them."""
    try:
        GenerateOptions(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return options


def _check_values(lm: decodax.LanguageModel, options: dict[str, Any], num_rows: int) -> None:
    """Values without a meaning are the command line's fault: they end with another exit code than a failed run."""
    try:
        checked, vocab_size = GenerateOptions(**options), lm.config.vocab_size
        with warnings.catch_warnings(action="ignore"):
            checked.sampling(num_rows, vocab_size, checked.end_tokens(lm.end_token_ids, vocab_size))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_strategy(name: str | None, draft_tokens: int | str | None) -> str | None:
    try:
        if name is not None:
            strategy_from_text(name, draft_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _read_draft_tokens(text: str | None) -> int | str | None:
    try:
        return text if text in (None, "auto") else int(text)
    except ValueError:
        raise typer.BadParameter(f"draft tokens must be a whole number or auto, got {text!r}") from None


def _read_ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise typer.BadParameter(f"stop token ids must be whole numbers like 0,7, got {text!r}") from None


def _read_biases(name: str, items: list[str] | None) -> dict[int, float] | None:
    biases = {}
    for item in items or ():
        token, _, value = item.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise typer.BadParameter(
                f"{name.replace('_', ' ')} must be a token id, = and a number, like 7=-2.5, got {item!r}"
            ) from None
    return biases or None


def _generate_quietly(lm: decodax.LanguageModel, prompts: list[Any], options: dict[str, Any]) -> Generation:
    with session.progress("generating"):
        return decodax.generate(lm, prompts, **options)


def _stream(lm: decodax.LanguageModel, shown: str, prompt: Any, options: dict[str, Any]) -> Generation:
    with session.progress("compiling and reading the prompt") as end_progress:
        write = _Writer(shown, end_progress)
        out = decodax.generate(lm, [prompt], on_text=write, **options)
    write(0, "\n")
    return out


class _Writer:
    """Writes a prompt and, piece by piece, what follows it."""

    def __init__(self, prompt: str, before: Callable[[], None]) -> None:
        self.prompt, self.before = prompt, before

    def __call__(self, row: int, piece: str) -> None:
        self.before()
        sys.stdout.write(session.bold(self.prompt) + piece)
        sys.stdout.flush()
        self.prompt = ""


def _summary(stats: Stats, finish_reasons: list[str]) -> str:
    reasons = ", ".join(f"{finish_reasons.count(reason)} x {reason}" for reason in dict.fromkeys(finish_reasons))
    drafted = f"; {stats.strategy}, {stats.tokens_per_forward:.2f} tokens per forward" if stats.accepted_lengths else ""
    return (
        f"{stats.num_new_tokens} new tokens in {stats.decode_seconds:.2f} s "
        f"({stats.tokens_per_second:.0f} tokens/s{drafted}); "
        f"{stats.num_prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s; "
        f"compiling {stats.compile_seconds:.2f} s; ended by {reasons}"
    )


def _print_json(lm: decodax.LanguageModel, texts: list[str], out: Generation) -> None:
    stats = dataclasses.asdict(out.stats) | {
        "tokens_per_second": out.stats.tokens_per_second,
        "prefill_tokens_per_second": out.stats.prefill_tokens_per_second,
        "tokens_per_forward": out.stats.tokens_per_forward,
        "acceptance_per_position": out.stats.acceptance_per_position,
    }
    document = {
        "prompts": texts,
        "text": out.text,
        "tokens": [row.tolist() for row in out.tokens],
        "logprobs": [row.tolist() for row in out.logprobs],
        "finish_reasons": out.finish_reasons,
        "seeds": out.seeds,
        "stats": stats,
        "model": session.describe(lm),
        "versions": session.versions(),
    }
    print(json.dumps(document, allow_nan=False))
