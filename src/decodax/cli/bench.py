"""`decodax bench` measures prefill and decode speed of a model on this machine."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

import decodax
from decodax.cli import session


@dataclass(frozen=True)
class Measurement:
    """The speed at one batch size: medians over the repetitions, compile time apart.

    Every decode step reads all weights once, so `weights_gigabytes_per_second` (10^9 bytes) over the bandwidth of the
    machine's memory says how near it is to the limit at small batches.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    milliseconds_per_step: float
    weights_gigabytes_per_second: float
    compile_seconds: float


def bench(
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    mesh: session.MeshName = None,
    batch: Annotated[str, typer.Option(metavar="B,B...", help="Batch sizes to measure.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens in each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each prompt.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs after the one that compiles; medians are shown.")] = 3,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure nothing: show which kernels this machine and model run, and why.")
    ] = False,
    routing: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Measure no speed: record which experts each token chooses, and draw them (.png)."
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Prompts for --routing, one per line.")
    ] = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Measure prefill and decode speed on this machine.

    Prompts are random token ids, decoding is greedy. Compiled programs are not taken from the cache: compile times are
    those of a first run.
    """
    with session.reported_errors(debug):
        sizes = _read_sizes(batch)
        if mesh is not None and (kernels or routing is not None):
            raise typer.BadParameter("--mesh is for measuring speed, not with --kernels or --routing")
        if kernels:
            _show_kernels(model, dtype, sizes[0], prompt_tokens, new_tokens, as_json)
            return
        if routing is not None:
            _show_routing(model, dtype, routing, texts, sizes[0], prompt_tokens, new_tokens, as_json)
            return
        if texts is not None:
            raise typer.BadParameter("texts are prompts for --routing, which was not given")
        jax.config.update("jax_enable_compilation_cache", False)
        lm = decodax.load(model, dtype=dtype, mesh=mesh)
        results = []
        for size in sizes:
            with session.progress(f"batch {size}"):
                results.append(_measure(lm, size, prompt_tokens, new_tokens, repetitions))
        if as_json:
            document = {
                "results": [asdict(result) for result in results],
                "model": session.describe(lm),
                "versions": session.versions(),
            }
            print(json.dumps(document))
        else:
            _print_table(lm, results)


def _read_sizes(text: str) -> list[int]:
    try:
        sizes = [int(item) for item in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"batch must be sizes like 1,8 (at least 1), got {text!r}")
    return sizes


def _show_kernels(
    model: str | None, dtype: str | None, batch_size: int, prompt_tokens: int, new_tokens: int, as_json: bool
) -> None:
    from decodax.cli import bench_kernels

    name, config, kind = bench_kernels.read_model(model, dtype)
    rows = bench_kernels.kernel_selections()
    layers = bench_kernels.layer_selections(config, kind, batch_size, prompt_tokens, new_tokens)
    machine = session.versions()
    if as_json:
        described = {"name": name, "dtype": kind, "batch_size": batch_size, "prompt_tokens": prompt_tokens}
        print(json.dumps(bench_kernels.document(rows, layers) | {"model": described, "versions": machine}))
    else:
        bench_kernels.print_tables(f"{name}, {kind}", rows, layers, f"{machine['device']}, jax {machine['jax']}")


def _show_routing(
    model: str | None,
    dtype: str | None,
    output: Path,
    texts: Path | None,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    as_json: bool,
) -> None:
    from decodax.cli import bench_routing

    if output.suffix != ".npz":
        raise typer.BadParameter(f"routing must be a file name ending in .npz, got {str(output)!r}")
    lm = decodax.load(model, dtype=dtype)
    if texts is not None:
        prompts: Any = bench_routing.read_texts(texts)
    else:
        prompts = _random_prompts(lm, batch_size, prompt_tokens)
    summary = bench_routing.trace_routing(lm, prompts, new_tokens, output)[1]
    if as_json:
        bench_routing.print_json(lm, summary)
    else:
        bench_routing.print_summary(lm.path.name, summary)


def _random_prompts(lm: decodax.LanguageModel, batch_size: int, prompt_tokens: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch_size, prompt_tokens)))


def weight_bytes_per_step(lm: decodax.LanguageModel) -> int:
    """Bytes of weights that a forward reads: all, but for the embedding where it is not also the head."""
    embedding = jax.eval_shape(lm.model.unstacked, lm.params)["embedding"]
    return lm.nbytes - (0 if lm.config.tie_embeddings else embedding.size * embedding.dtype.itemsize)


def _measure(
    lm: decodax.LanguageModel, batch_size: int, prompt_tokens: int, new_tokens: int, repetitions: int
) -> Measurement:
    prompts = _random_prompts(lm, batch_size, prompt_tokens)

    def run() -> Any:
        return decodax.generate(lm, prompts, max_new_tokens=new_tokens, stop_token_ids=[]).stats

    compiling = run().compile_seconds
    stats = [run() for _ in range(repetitions)]
    prefill = statistics.median(run.prefill_tokens_per_second for run in stats)
    step = statistics.median(run.decode_seconds / run.target_forwards for run in stats)
    decode = statistics.median(run.tokens_per_second for run in stats)
    bandwidth = weight_bytes_per_step(lm) / step / 1e9
    return Measurement(batch_size, prompt_tokens, new_tokens, prefill, decode, step * 1e3, bandwidth, compiling)


def _print_table(lm: decodax.LanguageModel, results: list[Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    model, machine = session.describe(lm), session.versions()
    size = f"{model['num_parameters'] / 1e6:,.1f} million parameters, {model['dtype']}"
    table = Table(
        title=f"{lm.path.name}: {size}",
        caption=f"{machine['device']}, jax {machine['jax']}; "
        f"{results[0].prompt_tokens} prompt tokens, {results[0].new_tokens} new tokens",
    )
    for heading in ("batch", "prefill tokens/s", "decode tokens/s", "ms per step", "weights GB/s", "compile s"):
        table.add_column(heading, justify="right")
    for row in results:
        table.add_row(
            str(row.batch_size),
            f"{row.prefill_tokens_per_second:,.0f}",
            f"{row.decode_tokens_per_second:,.0f}",
            f"{row.milliseconds_per_step:.2f}",
            f"{row.weights_gigabytes_per_second:.1f}",
            f"{row.compile_seconds:.1f}",
        )
    Console().print(table)
