"""`decodax plan`: which mesh suits a model on TPUs or GPUs that need not be there, and what it would do."""

import json
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from decodax.cli import session

_CONTEXT = 2048  # by default
_LAYOUTS = 6  # of the best meshes, among which each layer chooses one
_OBJECTIVES = ("time-per-token", "time-to-first-token", "throughput", "fit")


def plan(
    topology: Annotated[
        str, typer.Option(help="A slice of TPUs or a machine of GPUs: v5e:4x4, v5p:4x4x8, gpu:h200x8.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or a config.json; weights are not read. Default: the small model."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of each row, prompt and output. Default: 2048, or the model's context."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and caches: bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[
        str, typer.Option(help="same, or int8: those of layers' products take a byte each (in the cost model alone).")
    ] = "same",
    cache: Annotated[str, typer.Option(help="same, or int8: a byte for each cached number (as --weights).")] = "same",
    objective: Annotated[str, typer.Option(help=f"What to look for: {', '.join(_OBJECTIVES)}.")] = _OBJECTIVES[0],
    mesh: Annotated[str | None, typer.Option(help="Look at this mesh alone, such as tensor=8,data=2.")] = None,
    compile_best: Annotated[int, typer.Option("--compile", min=0, help="Compile so many of the best plans.")] = 1,
    as_json: session.Json = False,
    picture: Annotated[Path | None, typer.Option(help="Draw memory and time into this PNG.")] = None,
    debug: session.Debug = False,
) -> None:
    """Plan how a model runs on a slice of TPUs, compiled without one, or on GPUs.

    The mesh it prints is what `decodax.load(mesh=)` and `decodax generate --mesh` take.

    Example: decodax plan --model Llama-3.1-8B --topology v5e:2x4 --batch 8 --context 2048
    """
    with session.reported_errors(debug):
        jax.config.update("jax_platforms", "cpu")  # a plan needs no device, and takes none from those who do
        _check("objective", objective, _OBJECTIVES)
        _check("dtype", dtype, ("bfloat16", "float16", "float32"))
        for name, value in (("weights", weights), ("cache", cache)):
            _check(name, value, ("same", "int8"))
        from decodax.sharding.plan import report as reports
        from decodax.sharding.plan.memory import Workload
        from decodax.sharding.plan.topology import parse_topology

        asked: Any = {"weights": weights, "cache": cache}
        where, config = parse_topology(topology), _config(model)
        tokens = min(_CONTEXT, config.max_position_embeddings) if context is None else context
        found = _find(config, where, Workload(batch, tokens, dtype, **asked), objective, mesh, compile_best)
        if picture is not None:
            from decodax.sharding.plan.picture import draw

            with session.progress("drawing"):
                draw(found, picture)
        if as_json:
            print(json.dumps(reports.as_dict(found) | {"versions": session.versions()}))
        else:
            reports.print_report(found)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _config(model: str | None) -> Any:
    """What a folder's config.json, or the file itself, describes."""
    from decodax.models.hf_config import load_config
    from decodax.models.load import find_folder

    path = Path(model).expanduser() if model is not None else find_folder(None)
    if not path.exists():
        raise FileNotFoundError(
            f"{model} is neither a model folder nor a config.json, and a plan needs that file alone"
        )
    return load_config(path)[1]


def _find(config: Any, where: Any, workload: Any, objective: Any, mesh: str | None, compile_best: int) -> Any:
    """The plans, the programs of the best of them, and what else the report tells."""
    from decodax.sharding.plan import compiled
    from decodax.sharding.plan.layerwise import layout_per_layer
    from decodax.sharding.plan.long_context import room
    from decodax.sharding.plan.report import Report
    from decodax.sharding.plan.search import DoesNotFitError, search

    with session.progress("looking at every mesh"):
        searched = search(config, where, workload, objective, mesh=mesh)
        plans = list(searched.plans)
    programs: list[tuple[compiled.Program, ...]] = []
    refused: list[str] = []
    while compile_best and compiled.cannot_compile(plans[0]) is None and len(programs) < min(compile_best, len(plans)):
        plan = plans[len(programs)]
        try:
            with session.progress(f"compiling the decoding step of {plan.split.text}"):
                step = compiled.compile_step(plan)
            with session.progress(f"compiling a prompt's chunk of {plan.split.text}"):
                prompt = compiled.compile_prompt(plan)
        except DoesNotFitError as error:
            refused.append(str(error))
            plans.remove(plan)
            if not plans:
                raise DoesNotFitError("; ".join(refused)) from error
            continue
        programs.append((step, prompt))
    with session.progress("looking for what else fits"):
        return Report(
            objective,
            tuple(plans),
            tuple(programs),
            room(plans[0]),
            layout_per_layer(plans[:_LAYOUTS]),
            tuple(refused),
            searched.left_out,
        )
