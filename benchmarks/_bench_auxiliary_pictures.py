"""Draws the picture of the `parts` benchmark: tokens per forward or agreement of each scheme over its settings."""

from pathlib import Path
from typing import Any

from benchmarks._bench_auxiliary import TARGETS
from decodax.decoding.training.extra import need

TREES = ("ppd", "ppd, static tree", "ppd, untrained", "medusa")
LOSSY = ("specee", "skip_decode", "skip_decode, weights unchanged", "first")


def draw_auxiliary(result: dict[str, Any], file: Path) -> None:
    """Three panels: trees by their size, early exits by tokens per full forward, lossy schemes by agreement.

    Dashed: loops left out.
    """
    need("matplotlib").use("agg")
    pyplot = need("matplotlib.pyplot")
    schemes = result["schemes"]
    figure, (trees, exits, lossy) = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    _draw_trees(trees, schemes)
    _draw_exits(exits, schemes)
    _draw_lossy(lossy, schemes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_trees(axes: Any, schemes: dict[str, Any]) -> None:
    for index, name in enumerate(TREES):
        sizes = [int(size) for size in schemes[name]]
        for label, style in (("", "-"), ("_loop_free", "--")):
            values = [facts[f"tokens_per_forward{label}"] for facts in schemes[name].values()]
            axes.plot(sizes, values, style, marker="o", ms=3, color=f"C{index}", label="" if label else name)
    for name, index in (("ppd", 0), ("medusa", 3)):
        axes.axhline(TARGETS[name], color=f"C{index}", lw=0.8, ls=":")
    axes.set(xlabel="tokens of a forward, prompt tokens included", ylabel="new tokens per forward", xscale="log")
    axes.set_title("Trees (dashed: loops left out)")
    axes.set_xticks([int(size) for size in schemes["ppd"]], labels=list(schemes["ppd"]))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_exits(axes: Any, schemes: dict[str, Any]) -> None:
    grid: dict[str, list[tuple[int, float, float]]] = {}
    for value, facts in schemes["layer_skip"].items():
        exit_layer, length = value.split(", ")
        numbers = (facts["tokens_per_full_forward"], facts["tokens_per_full_forward_loop_free"])
        grid.setdefault(exit_layer, []).append((int(length), *numbers))
    for index, (exit_layer, points) in enumerate(grid.items()):
        lengths, values, loop_free = zip(*points, strict=True)
        axes.plot(lengths, values, "o-", ms=3, color=f"C{index}", label=f"exit after layer {exit_layer}")
        axes.plot(lengths, loop_free, "--", color=f"C{index}")
    for name, color in (("del", "k"), ("kangaroo", "C7")):
        best = max(facts["tokens_per_full_forward"] for facts in schemes[name].values())
        axes.axhline(best, color=color, lw=1, label=f"{name} (best)" if len(schemes[name]) > 1 else name)
    axes.axhline(1, color="0.6", lw=0.8, ls=":")
    axes.set(xlabel="tokens of a draft", ylabel="new tokens per full forward", title="Early layers draft")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_lossy(axes: Any, schemes: dict[str, Any]) -> None:
    for index, name in enumerate(LOSSY):
        facts = list(schemes[name].values())
        gain = [one["tokens_per_full_forward"] for one in facts]
        axes.plot(gain, [one["followed"] for one in facts], "o-", ms=4, color=f"C{index}", label=name)
    axes.set(xlabel="new tokens per full forward", ylabel="share of tokens that plain decoding writes there")
    axes.set(title="Not lossless: gain against agreement", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
