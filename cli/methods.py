"""`decodax methods`: everything the library can plug in, from the catalogue."""

import json
from dataclasses import asdict

from decodax.cli import session


def methods(as_json: session.Json = False, debug: session.Debug = False) -> None:
    """List every method: name, kind, folder, paper, lossless, trained part, test."""
    with session.reported_errors(debug):
        from decodax.catalogue import catalogue

        rows = catalogue()
        if as_json:
            print(json.dumps([asdict(row) for row in rows]))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(caption="--json tells also the folder and the test of each")
        for heading in ("name", "kind", "lossless"):
            table.add_column(heading, no_wrap=True)
        table.add_column("paper")
        table.add_column("trained part")
        for row in rows:
            table.add_row(row.name, row.kind, "yes" if row.lossless else "no", row.paper, row.trained_part or "-")
        Console().print(table)
