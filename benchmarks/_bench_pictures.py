"""Draws the pictures of the decoding benchmark, from its result file."""

from pathlib import Path
from typing import Any

from decodax.decoding.training.extra import need


def _new(width: int, size: tuple[float, float]) -> tuple[Any, Any]:
    need("matplotlib").use("agg")
    return need("matplotlib.pyplot").subplots(1, width, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    need("matplotlib.pyplot").close(figure)


def draw_schemes(result: dict[str, Any], path: Path) -> None:
    """Bars: tokens per target forward (whole and loop-free), then the speed-up at every batch size and temperature."""
    names = list(result["schemes"])
    figure, axes = _new(2, (12, 1.2 + 0.6 * len(names)))
    bars = {
        "greedy": [result["schemes"][name]["greedy"]["tokens_per_forward"] for name in names],
        "greedy, loops left out": [result["schemes"][name]["greedy"]["tokens_per_forward_loop_free"] for name in names],
        "temperature 1": [result["schemes"][name]["temperature 1"]["tokens_per_forward"] for name in names],
    }
    _bars(axes[0, 0], names, bars, "tokens per target forward")
    speed = {
        label: [by[name]["speed_up"]["median"] if name in by else None for name in names]
        for label, by in result["speed"].items()
    }
    _bars(axes[0, 1], names, speed, "speed-up over plain decoding")
    axes[0, 1].set_yticklabels([])
    _save(figure, path)


def _bars(axes: Any, names: list[str], series: dict[str, list[float | None]], label: str) -> None:
    height = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        at = [index + place * height for index in range(len(names))]
        axes.barh(at, [value or 0.0 for value in values], height, label=name)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="0.3", lw=1)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # clear of the bars


def draw_trees(result: dict[str, Any], path: Path) -> None:
    """Tokens per target forward over the number of draft tokens, a panel per temperature, a line per shape."""
    heats = sorted({point["temperature"] for point in result["points"]})
    figure, axes = _new(len(heats), (5.5 * len(heats), 4.2))
    for panel, heat in zip(axes[0], heats, strict=True):
        points = [point for point in result["points"] if point["temperature"] == heat]
        for shape in dict.fromkeys(point["shape"] for point in points):
            for key, style, which in (("", "o-", ""), ("_loop_free", "o:", ", loops left out")):
                line = [(p["nodes"], p[f"tokens_per_forward{key}"]) for p in points if p["shape"] == shape]
                colour = panel.lines[-1].get_color() if key else None
                panel.plot(*zip(*line, strict=True), style, ms=4, color=colour, label=shape + which)
        title = f"temperature {heat:g}" if heat else "greedy"
        panel.set(xlabel="draft tokens per forward", ylabel="tokens per target forward", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    _save(figure, path)


def draw_latency(result: dict[str, Any], path: Path) -> None:
    """L(N), and beside it what the loops reach of their bound."""
    figure, axes = _new(2, (10, 3.8))
    curve = {int(size): 1e3 * seconds for size, seconds in result["latency_seconds"].items()}
    axes[0, 0].plot(list(curve), list(curve.values()), "o-", ms=4)
    axes[0, 0].set(xlabel="tokens in one forward, N", ylabel="L(N), milliseconds", ylim=(0, None))
    axes[0, 0].grid(alpha=0.3)
    for name, loop in result["loops"].items():
        axes[0, 1].plot(loop["bound"], loop["speed_up"]["median"], "o", ms=5, label=name)
    top = max(loop["bound"] for loop in result["loops"].values()) * 1.05
    axes[0, 1].plot([0, top], [0, top], color="0.3", lw=1, label="the bound")
    axes[0, 1].plot([0, top], [0, 0.9 * top], color="0.3", lw=1, ls="--", label="0.9 of it")
    axes[0, 1].set(xlabel="tokens per forward x L(1) / L(C)", ylabel="measured speed-up")
    axes[0, 1].grid(alpha=0.3)
    axes[0, 1].legend(fontsize="x-small", ncols=2)
    _save(figure, path)
