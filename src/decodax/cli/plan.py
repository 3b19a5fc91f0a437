"""`decodax plan` finds the mesh for a model on TPUs or GPUs, which need not be there, and predicts memory and time."""

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
    batch: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of each row, prompt and output. Default: 2048, or the model's context."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and caches: bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[
        str, typer.Option(help="same, or int8: a byte per weight of the layers' products (in the cost model alone).")
    ] = "same",
    cache: Annotated[str, typer.Option(help="same, or int8: a byte per cached number (as --weights).")] = "same",
    objective: Annotated[str, typer.Option(help=f"What to optimise: {', '.join(_OBJECTIVES)}.")] = _OBJECTIVES[0],
    mesh: Annotated[str | None, typer.Option(help="Plan this mesh alone, such as tensor=8,data=2.")] = None,
    compile_best: Annotated[int, typer.Option("--compile", min=0, help="How many of the best plans to compile.")] = 1,
    as_json: session.Json = False,
    picture: Annotated[Path | None, typer.Option(help="Draw memory and time into this PNG.")] = None,
    debug: session.Debug = False,
) -> None:
    """Plan how a model runs on a slice of TPUs, compiled without one, or on GPUs.

    The mesh it prints is what `decodax.load(mesh=)` and `decodax generate --mesh` take.

    Example: decodax plan --model Llama-3.1-8B --topology v5e:2x4 --batch 8 --context 2048
    """
    with session.reported_errors(debug):
        jax.config.update("jax_platforms", "cpu")  # a plan needs no device, and occupies none
        _check("objective", objective, _OBJECTIVES)
        _check("dtype", dtype, ("bfloat16", "float16", "float32"))
        for name, value in (("weights", weights), ("cache", cache)):
            _check(name, value, ("same", "int8"))
        from decodax.planning import report as reports
        from decodax.planning.memory import Workload
        from decodax.planning.topology import parse_topology

        stored: Any = {"weights": weights, "cache": cache}
        where, config = parse_topology(topology), _config(model)
        tokens = min(_CONTEXT, config.max_position_embeddings) if context is None else context
        found = _find(config, where, Workload(batch, tokens, dtype, **stored), objective, mesh, compile_best)
        if picture is not None:
            from decodax.planning.picture import draw

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
    """The model that a folder's config.json, or the file itself, describes."""
    from decodax.models.configs.hf_config import load_config
    from decodax.models.load import find_folder

    path = Path(model).expanduser() if model is not None else find_folder(None)
    if not path.exists():
        raise FileNotFoundError(
            f"{model} is neither a model folder nor a config.json, and a plan needs that file alone"
        )
    return load_config(path)[1]


def _find(config: Any, where: Any, workload: Any, objective: Any, mesh: str | None, compile_best: int) -> Any:
    """The plans, the programs of the best of them, and the other facts of the report."""
    from decodax.planning import compiled
    from decodax.planning.layerwise import layout_per_layer
    from decodax.planning.long_context import room
    from decodax.planning.report import Report
    from decodax.planning.search import DoesNotFitError, search

    with session.progress("planning every mesh"):
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
    with session.progress("finding what else fits"):
        return Report(
            objective,
            tuple(plans),
            tuple(programs),
            room(plans[0]),
            layout_per_layer(plans[:_LAYOUTS]),
            tuple(refused),
            searched.left_out,
        )
