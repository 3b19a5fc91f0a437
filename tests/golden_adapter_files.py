"""Copies of the golden LoRA adapters that tests change, and what `decodax.load` says of them."""

import json
import shutil
from pathlib import Path

import pytest

import decodax
from tests.golden_files import load_golden

GOLDEN = Path(__file__).parent / "golden_adapters"
LLAMA = load_golden("llama").folder


def copy_adapter(case, folder):
    return Path(shutil.copytree(GOLDEN / case, folder))


def change(folder, **fields):
    """Changes fields of the settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder, match, error=ValueError, model=LLAMA):
    with pytest.raises(error, match=match) as caught:
        decodax.load(model, adapter=folder)
    assert "\n" not in str(caught.value)
