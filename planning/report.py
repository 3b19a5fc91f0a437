"""Prints a plan as tables in a terminal, and converts it to a dictionary for programs."""

import dataclasses
from typing import Any

from decodax.planning.chips import Chip
from decodax.planning.compiled import Program, cannot_compile
from decodax.planning.cost import LIMITS, Cost
from decodax.planning.layerwise import PerLayer
from decodax.planning.long_context import MOST_ROWS, Room
from decodax.planning.search import LeftOut, Objective, Plan

SHOWN = 5
LISTED = 4  # meshes that were left out for the same reason
# What the numbers of the model and of the compiler count, and why they differ.
COUNTED_BY_THE_MODEL = (
    "GFLOP: of matrix products and attention. GB moved: each weight, cached token and activation once, between a "
    "chip's memory and its arithmetic."
)
COUNTED_BY_THE_COMPILER = (
    "GFLOP and GB accessed are XLA's count of one step of this program: all operations, and bytes in every memory they "
    "pass (three times for a weight that is fetched ahead); so they are not the model's, which alone times come from."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a search.

    objective: what the plans are sorted by.
    plans: the best first.
    programs: of the plans that were compiled, in the same order.
    room: what fits with the best plan.
    per_layer: what one mesh per layer could gain.
    refused: the compiler's errors for plans that it found no room for; they are not among `plans`.
    left_out: meshes without a plan.
    """

    objective: Objective
    plans: tuple[Plan, ...]
    programs: tuple[tuple[Program, ...], ...]
    room: Room
    per_layer: PerLayer | None
    refused: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def best(self) -> Plan:
        return self.plans[0]

    @property
    def by_model_only(self) -> str | None:
        """Why nothing was compiled, None if something was."""
        return None if self.programs else cannot_compile(self.best) or "nothing was compiled, as was asked"


def as_dict(report: Report) -> dict[str, Any]:
    """The report for `json.dumps`."""
    best, workload = report.best, report.best.workload
    return {
        "topology": best.topology.name,
        "chip": _chip(best.topology.chip),
        "num_chips": best.topology.num_chips,
        "workload": dataclasses.asdict(workload),
        "objective": report.objective,
        "mesh": best.split.text,
        "rules": "decodax.sharding.rules.RULES",
        "by_model_only": report.by_model_only,
        "plans": [plan_as_dict(plan) for plan in report.plans],
        "programs": [[_program(program) for program in programs] for programs in report.programs],
        "refused_by_the_compiler": list(report.refused),
        "left_out": [dataclasses.asdict(one) for one in report.left_out],
        "counted": {"by_the_model": COUNTED_BY_THE_MODEL, "by_the_compiler": COUNTED_BY_THE_COMPILER},
        "room": dataclasses.asdict(report.room),
        "layout_per_layer": None if report.per_layer is None else report.per_layer._asdict(),
    }


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "mesh": plan.split.text,
        "bytes_per_chip": dataclasses.asdict(plan.memory) | {"total": plan.memory.total, "free": plan.memory.free},
        "seconds_per_token": plan.seconds_per_token,
        "tokens_per_second": plan.tokens_per_second,
        "prompt_seconds": plan.prompt_seconds,
        "seconds_to_first_token": plan.seconds_to_first_token,
        "turns_of_a_pipeline": plan.token_turns,
        "token": _cost(plan.token),
        "prompt_chunk": _cost(plan.chunk),
    }


def _chip(chip: Chip) -> dict[str, Any]:
    left_out = ("slices", "network")
    fields = {field.name: getattr(chip, field.name) for field in dataclasses.fields(chip) if field.name not in left_out}
    return fields | {"network": dataclasses.asdict(chip.network)}


def _cost(cost: Cost) -> dict[str, Any]:
    return dataclasses.asdict(cost) | {"total_seconds": cost.total, "limited_by": cost.limit}


def _program(program: Program) -> dict[str, Any]:
    fields = dataclasses.asdict(program) | {"total_bytes": program.total_bytes}
    fields["collectives"] = [
        {"kind": one.kind, "num_bytes": one.num_bytes, "devices": one.devices, "count": count}
        for one, count in program.collectives
    ]
    return fields


def print_report(report: Report) -> None:
    """Prints tables on stdout: the plans, the best one's time by its limits, compiled programs, what fits."""
    from rich.console import Console

    console = Console()
    for table in (_plans_table(report), _time_table(report.best)):
        console.print(table)
    for plan, programs in zip(report.plans, report.programs, strict=False):
        for program in programs:
            console.print(_program_table(plan, program))
    for refusal in report.refused:
        console.print(f"left out: {refusal}")
    for line in _left_out(report):
        console.print(line, highlight=False, markup=False)
    if report.by_model_only is not None:
        console.print(f"[bold]by the model only[/bold]: {report.by_model_only}")
    console.print(_room_text(report))
    if report.per_layer is not None and report.per_layer.seconds < 0.99 * report.per_layer.seconds_with_one:
        gain = 1 - report.per_layer.seconds / report.per_layer.seconds_with_one
        console.print(f"a layout for each layer could save {gain:.0%} of the layers' time; `load` takes one for all")
    console.print(f'[bold]decodax.load(..., mesh="{report.best.split.text}")[/bold], with the default rules')


def _left_out(report: Report) -> list[str]:
    """A line for each reason, with the first meshes that it excludes."""
    meshes: dict[str, list[str]] = {}
    for one in report.left_out:
        meshes.setdefault(one.reason, []).append(one.mesh)
    lines = []
    for reason, names in meshes.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        lines.append(f"left out: {reason} ({'; '.join(names[:LISTED])}{more})")
    return lines


def _plans_table(report: Report) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    best = report.best
    workload = best.workload
    title = (
        f"{best.topology.name} ({best.topology.num_chips} x {best.topology.chip.title}): {workload.batch} rows of "
        f"{workload.context} tokens, weights {workload.dtype if workload.weights == 'same' else workload.weights}"
    )
    caption = f"{len(report.plans)} meshes fit; the best for {report.objective} come first"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)  # narrow, for a terminal of 80 columns
    table.add_column("mesh", overflow="fold")
    for heading in ("token\nms", "tokens\n/s", "prompt\nms", "weights\nGiB", "cache\nGiB", "free\nGiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited\nby", no_wrap=True)
    for plan in report.plans[:SHOWN]:
        sizes = (plan.memory.weights, plan.memory.cache, plan.memory.free)
        numbers = [f"{plan.seconds_per_token * 1e3:.2f}", f"{plan.tokens_per_second:.0f}"]
        numbers += [f"{plan.prompt_seconds * 1e3:.0f}", *(f"{size / 2**30:.2f}" for size in sizes)]
        table.add_row(plan.split.text, *numbers, plan.token.bound)
    return table


def _time_table(plan: Plan) -> Any:
    from rich.table import Table

    title = f"where the time of {plan.split.text} goes, per chip"
    table = Table(title=title, caption=COUNTED_BY_THE_MODEL, caption_justify="left")
    table.add_column("")
    for heading in ("token\nms", "mean-\nwhile", "chunk of a\nprompt, ms", "mean-\nwhile"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, words in LIMITS.items():
        cells = []
        for cost in (plan.token, plan.chunk):
            hidden = cost.hidden.get(name)
            cells += [f"{cost.seconds[name] * 1e3:.3f}", "" if hidden is None else f"{hidden * 1e3:.3f}"]
        table.add_row(words, *cells)
    table.add_section()
    totals = [(cost.total * 1e3, cost.flops / 1e9, cost.moved_bytes / 1e9) for cost in (plan.token, plan.chunk)]
    for index, words in enumerate(("in all", "GFLOP", "GB moved")):
        table.add_row(words, f"{totals[0][index]:.3f}", "", f"{totals[1][index]:.3f}", "")
    table.add_section()
    for label, cost in (("token", plan.token), ("chunk", plan.chunk)):
        for one in cost.collectives:
            what = f"{one.count} x {one.kind} over {'+'.join(one.axes)}"
            size = f"{one.num_bytes / 1e6:.2f} MB, {one.seconds * 1e3:.3f} ms"
            cells = [size, "", "", ""] if label == "token" else ["", "", size, ""]
            table.add_row(what, *cells)
    return table


def _program_table(plan: Plan, program: Program) -> Any:
    from rich.table import Table

    layers = "" if program.num_layers == program.of_layers else f", {program.num_layers} of {program.of_layers} layers"
    usable = plan.memory.usable
    title = (
        f"compiled for {plan.topology.name}: {program.what} of {plan.split.text}{layers}, in {program.seconds:.0f} s"
    )
    table = Table(title=title, show_header=False, caption=COUNTED_BY_THE_COMPILER, caption_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for words, size in (
        ("weights", program.weight_bytes),
        ("cache and state", program.state_bytes),
        ("arguments, as the compiler counts them", program.argument_bytes),
        ("temporaries", program.temporary_bytes),
        ("code", program.code_bytes),
        ("in all", program.total_bytes),
        ("memory that a program may use", usable),
    ):
        table.add_row(words, f"{size / 2**30:.3f} GiB")
    table.add_section()
    table.add_row("GFLOP", f"{program.flops / 1e9:.2f}")
    table.add_row("GB accessed in all memories", f"{program.accessed_bytes / 1e9:.2f}")
    table.add_section()
    for one, count in program.collectives:
        among = "" if one.devices is None else f" among {one.devices}"
        table.add_row(f"{count} x {one.kind}{among}", f"{one.num_bytes:,} bytes each")
    return table


def _room_text(report: Report) -> str:
    plan, room = report.best, report.room
    more = " or more" if room.most_rows + plan.split.degree("data") > MOST_ROWS else ""
    whole = " (the model's context)" if room.is_whole_context else ""
    return (
        f"room for {room.most_rows:,}{more} rows of {plan.workload.context:,} tokens, or {plan.workload.batch} rows of "
        f"{room.most_tokens:,}{whole}; a further token of every row takes {room.cached_token_bytes:,.0f} bytes on a "
        f"chip; one row's cache goes to the host in {room.switch_seconds * 1e3:.1f} ms"
    )
