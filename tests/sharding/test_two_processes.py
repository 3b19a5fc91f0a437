"""Two processes with four CPU devices each give the results of one device, and both end when one fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decodax
from tests import processes
from tests.processes import Ended
from tests.sharding import one_of_two
from tests.sharding.small_model import write_small_model

# Logits are sums of a few hundred float32 products of size 1, which two orders of summation leave some 1e-6 apart.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def alone(folder: Path) -> decodax.LanguageModel:
    """The model on one device of this process."""
    return decodax.load(folder)


def run_two(folder: Path, mesh: str, *cases: str) -> list[Ended]:
    port = str(processes.free_port())
    module = ["-m", "tests.sharding.one_of_two"]
    started = [processes.start([*module, port, str(place), str(folder), mesh, *cases]) for place in (0, 1)]
    return processes.finish(started)


def results(ended: Ended) -> dict[str, Any]:
    lines = [json.loads(line.removeprefix("RESULT ")) for line in ended.out.splitlines() if line.startswith("RESULT ")]
    assert all(line["devices"] == 2 * processes.DEVICES_EACH for line in lines)
    return {line["case"]: line["result"] for line in lines}


def check(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same tokens, texts and reasons; log-probabilities to rounding."""
    assert {**result, "logprobs": None} == json.loads(json.dumps({**expected, "logprobs": None}))
    for own, other in zip(result["logprobs"], expected["logprobs"], strict=True):
        np.testing.assert_allclose(own, other, atol=TOLERANCE)


@pytest.mark.slow
def test_the_library_gives_one_devices_tokens(folder: Path, alone: decodax.LanguageModel):
    # Rows are in different processes; the command's test below splits heads and the vocabulary between them.
    cases = ("plain", "drafts", "differ", "settle")
    ended = run_two(folder, "tensor=4,data=2", *cases)
    for process in ended:
        assert process.code == 0, process.err[-3000:]
        found = results(process)
        assert tuple(found) == cases
        for case in ("plain", "drafts"):
            check(found[case], one_of_two.run(alone, case))
        wrong = ("prompts", "max_new_tokens", "seed", "on_text", "stop, temperature")
        for name, message in zip(wrong, found["differ"], strict=True):
            assert f"must be given the same {name}: process 1 got others than process 0" in message
        assert found["settle"] == [0.1, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=8", "data=8", "tensor=2,context=4"])
def test_every_mesh_and_option(folder: Path, alone: decodax.LanguageModel, mesh: str):
    cases = (*one_of_two.OPTIONS, "logits")
    expected = np.asarray(decodax.logits(alone, np.arange(14).reshape(2, 7)))
    for process in run_two(folder, mesh, *cases):
        assert process.code == 0, process.err[-3000:]
        found = results(process)
        assert tuple(found) == cases
        np.testing.assert_allclose(found["logits"], expected, atol=TOLERANCE)
        for case in one_of_two.OPTIONS:
            check(found[case], one_of_two.run(alone, case))
        assert found["stops"]["streamed"] == found["stops"]["text"]


def command(folder: Path, port: int, place: int, *more: str) -> list[str]:
    where = ["--distributed", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(place)]
    return ["-m", "decodax", "generate", one_of_two.PROMPTS[0], "--model", str(folder), *where, *more]


@pytest.mark.slow
def test_the_command_prints_once_and_the_same(folder: Path, alone: decodax.LanguageModel):
    port = processes.free_port()
    options = ("--mesh", "tensor=8", "--max-new-tokens", "7", "--no-compilation-cache")
    first, second = processes.finish([processes.start(command(folder, port, place, *options)) for place in (0, 1)])
    assert (first.code, second.code) == (0, 0), (first.err[-3000:], second.err[-3000:])
    expected = decodax.generate(alone, one_of_two.PROMPTS[0], max_new_tokens=7)
    assert expected.text is not None
    # Gloo, which carries JAX's collectives on CPU, prints to stdout by itself; none of that may be here.
    assert first.out == one_of_two.PROMPTS[0] + expected.text[0] + "\n"
    assert second.out == ""
    assert "7 new tokens in" in first.err and "new tokens" not in second.err
    assert "warning" not in (first.err + second.err).lower()


def test_a_host_that_never_joins(folder: Path):
    port = processes.free_port()
    (ended,) = processes.finish(
        [processes.start(command(folder, port, 0, "--mesh", "tensor=8", "--join-timeout", "1"))]
    )
    assert ended.code == 1 and ended.out == ""
    assert f"error: 1 of 2 processes came to 127.0.0.1:{port} within 1 s; missing: 1. Check that" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("case", "code"), [("dies", -9), ("fails", 1)])
def test_a_process_that_ends_early_ends_the_other(folder: Path, case: str, code: int):
    """By an error of its own or by JAX's abort, before `finish` kills it; it has the first case's results by then."""
    first, second = run_two(folder, "tensor=4,data=2", "plain", case)
    assert second.code == code and ("planted" in second.err) == (case == "fails")
    assert first.code not in (0, -9)
    assert tuple(results(first)) == ("plain",)
    assert "Error" in first.err
