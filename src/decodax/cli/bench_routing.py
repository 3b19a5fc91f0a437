"""`decodax bench --routing` records which experts the tokens of some texts choose, in a file and a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import decodax
from decodax.cli import session
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.routing_trace import RoutingTrace, draw_routes, record_routes


def read_texts(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises ValueError when there are none.
    """
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{file} holds no text: one prompt per line is expected")
    return texts


def trace_routing(
    lm: decodax.LanguageModel, prompts: Any, new_tokens: int, output: Path
) -> tuple[RoutingTrace, dict[str, Any]]:
    """Continues the prompts, records the experts of all tokens, and writes `output` (.npz) and its picture (.png)."""
    with session.progress("generating"):
        generated = decodax.generate(lm, prompts, max_new_tokens=new_tokens, stop_token_ids=[]).tokens
    given = encode_prompts(lm, prompts)
    texts = [np.concatenate([prompt, new]) for prompt, new in zip(given, generated, strict=True)]
    with session.progress("recording"):
        trace = record_routes(lm, texts, [len(prompt) for prompt in given])
    trace.save(output)
    image = output.with_suffix(".png")
    draw_routes(trace, image, title=f"Experts chosen by {len(trace.token):,} tokens: {lm.path.name}")
    return trace, describe(trace) | {"file": str(output), "picture": str(image)}


def describe(trace: RoutingTrace) -> dict[str, Any]:
    """A trace in numbers, layer by layer."""
    counts, imbalance = trace.counts(), trace.imbalance()
    layers = [
        {
            "layer": int(layer),
            "experts": int(size),
            "unused_experts": int((line[:size] == 0).sum()),
            "busiest_over_average": float(most),
        }
        for layer, size, line, most in zip(trace.layer, trace.num_experts, counts, imbalance, strict=True)
    ]
    return {"tokens": len(trace.token), "output_tokens": int(trace.is_output.sum()), "layers": layers}


def print_summary(name: str, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: {summary['tokens']:,} tokens", caption=f"{summary['file']}, {summary['picture']}")
    for heading in ("layer", "experts", "never chosen", "busiest / average"):
        table.add_column(heading, justify="right")
    for row in summary["layers"]:
        busiest = f"{row['busiest_over_average']:.2f}"
        table.add_row(str(row["layer"]), str(row["experts"]), str(row["unused_experts"]), busiest)
    Console().print(table)


def print_json(lm: decodax.LanguageModel, summary: dict[str, Any]) -> None:
    print(json.dumps(summary | {"model": session.describe(lm), "versions": session.versions()}))
