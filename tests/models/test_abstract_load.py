"""A dry run of loading checks published models' tensors without a number of theirs, and gives shapes and shardings."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from tests.golden_files import load_golden
from tests.golden_headers import unpacked

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "published.json").read_text("utf-8"))
PLAIN = [
    name
    for name, item in PUBLISHED.items()
    if "tensors" in item and not {"quantization_config", "quantization"} & item["config"].keys()
]


def write_header(folder, config, shapes):
    """A model folder whose weights are a hole in a file: their names and shapes are there, and no numbers."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))


def shapes_of(lm):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lm.params)


@pytest.mark.filterwarnings("ignore::UserWarning")  # notes on fields: tested in test_hf_config.py
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.quick_cases(6)
def test_published_models(tmp_path, name):
    item = PUBLISHED[name]
    shapes = unpacked(item["tensors"])
    write_header(tmp_path, item["config"], shapes)
    lm = decodax.load(tmp_path, abstract=True, dtype="bfloat16")
    # A tied head is stored once.
    assert sum(leaf.size for leaf in jax.tree.leaves(lm.params)) == sum(np.prod(shape) for shape in shapes.values())
    shapes.pop(lost := next(reversed(shapes)))
    write_header(tmp_path, item["config"], shapes)
    with pytest.raises(ValueError, match=f"missing: {lost}|wrong field"):
        decodax.load(tmp_path, abstract=True)


def test_shapes_are_those_that_are_loaded():
    folder = load_golden("phi3").folder
    lm = decodax.load(folder, abstract=True)
    assert lm.is_abstract and shapes_of(lm) == shapes_of(decodax.load(folder))
    for call in (lambda: decodax.generate(lm, [[1, 2]]), lambda: decodax.logits(lm, [[1, 2]])):
        with pytest.raises(ValueError, match="loaded with abstract=True"):
            call()


def test_shardings_are_those_that_are_loaded():
    folder = load_golden("gpt_neox").folder
    options = {"mesh": "tensor=2,data=4"}
    dry, loaded = decodax.load(folder, abstract=True, **options), decodax.load(folder, **options)
    assert shapes_of(dry) == shapes_of(loaded)
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, lm.params) for lm in (dry, loaded))
    assert next(shardings) == next(shardings)


def test_a_config_alone_will_do(tmp_path):
    shutil.copy(load_golden("llama").folder / "config.json", tmp_path)
    assert decodax.load(tmp_path, abstract=True).is_abstract
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        decodax.load(tmp_path)
