"""Draws the best plans: the memory of a chip by its contents, and the time of a token by its limits."""

from pathlib import Path

from decodax.decoding.training.extra import need
from decodax.planning.cost import LIMITS
from decodax.planning.report import SHOWN, Report


def draw(report: Report, image: Path) -> None:
    """Writes a PNG atomically. Raises ImportError without matplotlib."""
    need("matplotlib").use("agg")
    pyplot = need("matplotlib.pyplot")
    plans = report.plans[:SHOWN]
    names = [plan.split.text.replace(",", ",\n") for plan in plans]
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(12, 2.2 + 0.6 * len(plans)), layout="constrained")
    places = list(range(len(plans)))[::-1]
    left = [0.0] * len(plans)
    for label in ("weights", "cache", "temporaries"):
        sizes = [getattr(plan.memory, label) / 2**30 for plan in plans]
        memory.barh(places, sizes, left=left, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    memory.axvline(plans[0].memory.usable / 2**30, color="black", linestyle="--", label="usable")
    memory.set(yticks=places, yticklabels=names, xlabel="GiB on each chip", title="memory")
    left = [0.0] * len(plans)
    for label, words in LIMITS.items():
        values = [plan.token.seconds[label] * plan.token_turns * 1e3 for plan in plans]
        if any(values):
            time.barh(places, values, left=left, label=words)
            left = [start + value for start, value in zip(left, values, strict=True)]
    time.set(yticks=places, yticklabels=names, xlabel="ms per token", title="time, by the model")
    for axes in (memory, time):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    workload, topology = report.best.workload, report.best.topology
    figure.suptitle(f"{topology.name}: {workload.batch} rows of {workload.context} tokens")
    image.parent.mkdir(parents=True, exist_ok=True)
    temporary = image.with_name(f".{image.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image)
