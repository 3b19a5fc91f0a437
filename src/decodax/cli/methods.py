"""`decodax methods` lists every method of the library, from the catalogue."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from decodax.cli import session

if TYPE_CHECKING:
    from decodax.catalogue import Method


def methods(as_json: session.Json = False, debug: session.Debug = False) -> None:
    """List every method: name, kind, whether it is lossless, paper, auxiliary weights.

    On a terminal that is a table; in a pipe or a file, one full line for each method. --json tells also the folder and
    the test of each.
    """
    with session.reported_errors(debug):
        from decodax.catalogue import catalogue

        rows = catalogue()
        if as_json:
            print(json.dumps([asdict(row) for row in rows]))
        elif sys.stdout.isatty():
            print("\n".join(table(rows, shutil.get_terminal_size().columns)))
        else:
            print("\n".join(lines(rows)))


def lines(rows: Sequence["Method"]) -> list[str]:
    """One line for each method: three columns, then texts of any length, "-" for none."""
    names, kinds = (max(len(getattr(row, field)) for row in rows) for field in ("name", "kind"))
    return [
        f"{row.name:{names}}  {row.kind:{kinds}}  {'lossless' if row.lossless else '-':8}  {row.paper or '-'}"
        + (f"; auxiliary weights: {row.auxiliary_weights}" if row.auxiliary_weights else "")
        + (f"; options: {', '.join(row.options)}" if row.options else "")
        for row in rows
    ]


def table(rows: Sequence["Method"], width: int) -> list[str]:
    """Kind by kind a line for each method, cut at `width` characters; of papers the numbers come first."""
    names = max(len(row.name) for row in rows)
    shown = [f"  {'name':{names}}  lossless  trained  paper (arXiv)"]
    for kind, members in groupby(rows, key=lambda row: row.kind):
        shown += ["", session.bold(kind)]
        for row in members:
            lossless, trained = ("yes" if value else "-" for value in (row.lossless, row.auxiliary_weights))
            line = f"  {row.name:{names}}  {lossless:8}  {trained:7}  {_shortest(row.paper)}"
            shown.append(line if len(line) <= width else f"{line[: max(width - 3, 0)]}...")
    return [*shown, "", "--json, or a pipe, shows whole titles, what has to be trained, and options"]


def _shortest(paper: str | None) -> str:
    """The arXiv numbers of the papers, then their titles."""
    if paper is None:
        return "-"
    numbers = re.findall(r"arXiv (\d{4}\.\d{4,5})", paper)
    return f"{', '.join(numbers)} {re.sub(r' *[(]arXiv [^)]*[)]', '', paper)}"
