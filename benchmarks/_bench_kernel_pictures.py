"""Draws the roofline of a device and each kernel under it, from the kernels' result file."""

from pathlib import Path
from typing import Any

from decodax.decoding.training.extra import need

MARKERS = {"xla": "x", "cudnn": "+", "ragged_dot": "+"}


def draw_roofline(result: dict[str, Any], path: Path) -> None:
    """Operations per second over operations per byte: the measured limits as lines, a point per record.

    A point for a kernel, fainter marks for XLA and peers on the same shapes.
    Raises ValueError if nothing was timed.
    """
    records = [record for record in result["records"] if record.get("seconds")]
    if not records:
        raise ValueError("there is no record with a time, so there is nothing to draw")
    need("matplotlib").use("agg")
    plot = need("matplotlib.pyplot")
    figure, axes = plot.subplots(figsize=(9, 6), layout="constrained")
    intensity = [record["flops"] / record["bytes"] for record in records]
    bandwidth = max(record["copy_bytes_per_second"] for record in records)
    rate = max(record["matmul_flops_per_second"] for record in records)
    ends = min(*intensity, rate / bandwidth) / 2, max(*intensity, rate / bandwidth) * 2
    roof = [ends[0], rate / bandwidth, ends[1]]
    axes.plot(roof, [min(rate, x * bandwidth) / 1e12 for x in roof], color="0.3", lw=1.5)
    axes.annotate(f"copy: {bandwidth / 1e12:.2f} TB/s", (roof[0], roof[0] * bandwidth / 1e12), fontsize="small")
    axes.annotate(f"matmul: {rate / 1e12:.0f} TFLOP/s", (roof[1], rate / 1e12), fontsize="small", va="bottom")
    colours = {kernel: f"C{index}" for index, kernel in enumerate(dict.fromkeys(r["kernel"] for r in records))}
    labelled = set()
    for record, x in zip(records, intensity, strict=True):
        other = record["implementation"] in MARKERS
        label = f"{record['kernel']}, {record['implementation']}"
        axes.plot(
            x,
            record["flops"] / record["seconds"] / 1e12,
            MARKERS.get(record["implementation"], "o"),
            color=colours[record["kernel"]],
            alpha=0.5 if other else 1.0,
            ms=6,
            label=None if label in labelled else label,
        )
        labelled.add(label)
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte", ylabel="TFLOP/s")
    axes.set_title(f"{result['device']}, {records[-1]['date']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    plot.close(figure)
