"""Writes result files that are whole at any time."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json_file(path: Path, value: Any) -> None:
    """Writes a JSON document, and then moves it to its place.

    JSON has no numbers that are not finite, as the error of a kernel that gives NaN: their names stand for them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    written.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    os.replace(written, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
