"""`decodax.load` refuses a bad option in one line, by name and before any file is read."""

import dataclasses
import inspect
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding import GenerateOptions
from decodax.decoding.logits_processors import METHODS as PROCESSORS
from decodax.sharding.pipeline import Pipeline
from decodax.sharding.rules import Rules
from tests.golden_files import load_golden

load = inspect.unwrap(decodax.load)  # as for users: without this session's type checks


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("path_or_id", (5, b"folder", ["folder"], True), "path_or_id must be the path of a folder, .* on the hub"),
        ("dtype", (5, "fp32", ["float32"], {"a": 1}, int, np.zeros(3)), "dtype must be one of float32, .* or None"),
        ("mesh", (5, b"data=1", [1], jax.devices(), {"data": 1}), r"mesh must be a text .* a jax\.sharding\.Mesh"),
        ("rules", (5, "data", [("B", "data")]), r"rules must be decodax\.sharding\.rules\.Rules"),
        ("invariant", (1, "yes", []), "invariant must be True or False"),
        ("sequence_parallel", (1, "no", ()), "sequence_parallel must be True or False"),
        ("adapter", (5, b"folder", {}), "adapter must be the path of a folder, .* or an AuxiliaryWeights"),
        ("implementation", ("cuda", "XLA", ["xla"], {}, 5), "implementation must be one of xla, tpu, gpu, "),
        ("pipeline", (2, "2", {"chunks": 2}), r"pipeline must be decodax\.sharding\.pipeline\.Pipeline"),
    ],
)
def test_refusals_name_the_option(name, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{expected}.*, got .+$"):
            load(**{"path_or_id": "nowhere", name: value})


def test_none_is_not_given():
    names = set(inspect.signature(load).parameters) - {"path_or_id"}
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load(Path("nowhere"), **dict.fromkeys(names))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": "2"}, "chunks must be a whole number, at least 1, got '2'"),
        ({"chunks": 0}, "chunks must be a whole number, at least 1, got 0"),
        ({"micro_batches": 1.5}, "micro_batches must be a whole number, at least 1, got 1.5"),
        ({"outside": (1,)}, r"outside must be two numbers of layers, first and last, got \(1,\)"),
        ({"outside": 3}, "outside must be two numbers of layers, first and last, got 3"),
    ],
)
def test_a_pipeline_names_unsupported_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(Pipeline.__init__)(object.__new__(Pipeline), **settings)


def test_the_signature_of_generate_is_its_options():
    """Editors and type checkers see every option, its default, and a line of help that is the option's own."""
    parameters = inspect.signature(inspect.unwrap(decodax.generate)).parameters
    options = {name: parameter.default for name, parameter in parameters.items() if name not in ("lm", "prompts")}
    assert options.pop("misspelt") is inspect.Parameter.empty
    assert options == {field.name: field.default for field in dataclasses.fields(GenerateOptions)}
    documented = [line.split(":")[0].strip(" *") for line in decodax.generate.__doc__.splitlines() if ":" in line]
    assert [name for name in documented if name in options] == list(options)
    for name, method in PROCESSORS.items():
        assert f"    {name} *: {method.help}\n" in decodax.generate.__doc__


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequence_parallel": True}, "sequence_parallel changes nothing here, as it needs a mesh axis 'tensor'"),
        ({"sequence_parallel": True, "mesh": "data=1"}, "sequence_parallel changes nothing here"),
        ({"pipeline": Pipeline(chunks=2)}, "pipeline changes nothing here, as it needs a mesh axis 'pipeline'"),
        ({"rules": Rules((("B", "data"),))}, "rules changes nothing here, as it needs a mesh"),
        ({"sequence_parallel": True, "mesh": "tensor=1"}, None),
        ({"rules": Rules((("B", "data"),)), "mesh": "data=1"}, None),
    ],
)
def test_options_that_change_nothing_without_a_mesh_say_so(options, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decodax.load(load_golden("llama").folder, **options)
    found = [str(one.message) for one in caught if "changes nothing" in str(one.message)]
    assert found == [] if said is None else len(found) == 1 and said in found[0]
