"""Draws the loss curve of a run's log, and beside it the measures on held-out text."""

import json
from collections.abc import Mapping
from pathlib import Path

from decodax.decoding.training.extra import need


def draw_loss(
    log: Path, image: Path, *, title: str, unit: str = "nats per token", shares: Mapping[str, str] | None = None
) -> None:
    """Writes the curve of `loss`, and of `heldout_loss` where it was measured, as a PNG.

    shares: names in the log of numbers between 0 and 1 -> their labels; they get a second panel.
    Raises ImportError without matplotlib.
    """
    need("matplotlib").use("agg")
    pyplot = need("matplotlib.pyplot")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    width = 2 if shares else 1
    figure, panels = pyplot.subplots(1, width, figsize=(3 + 4 * width, 4), layout="constrained", squeeze=False)
    axes = panels[0, 0]
    axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], color="0.6", lw=1, label="training")
    measured = [e for e in entries if "heldout_loss" in e]
    axes.plot([e["step"] for e in measured], [e["heldout_loss"] for e in measured], "o-", ms=3, label="held out")
    axes.set(xlabel="step", ylabel=unit, title=title, yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(need("matplotlib.ticker").LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    for name, label in (shares or {}).items():
        found = [e for e in entries if name in e]
        panels[0, 1].plot([e["step"] for e in found], [e[name] for e in found], "o-", ms=3, label=label)
    if shares:
        panels[0, 1].set(xlabel="step", ylabel="share of positions", ylim=(0, 1), title="On held-out text")
        panels[0, 1].grid(alpha=0.3)
        panels[0, 1].legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    temporary = image.with_name(f".{image.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image)
