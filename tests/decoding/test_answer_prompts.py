"""A file of prompts is answered line by line as each prompt alone; cut off anywhere, the output is the same file."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import decodax
from decodax.decoding.answer_file import AnswerFile
from decodax.decoding.answer_prompts import answer_prompts
from decodax.decoding.options import GenerateOptions
from decodax.decoding.prompt_file import read_prompt_file
from decodax.decoding.random import fold_seed
from tests.decoding.test_generation import LM, ids

TEXTS = ("abc", "x", "quick fox", "no")
LINES = [
    *({"prompt": text, "max_new_tokens": 3 + 2 * index} for index, text in enumerate(TEXTS)),
    {"prompt": "the fox", "temperature": 0.8, "seed": 7},
    {"tokens": ids("brown"), "temperature": 1.1, "logit_bias": {"3": -50.0}},
    {"prompt": "a", "temperature": 0.9, "seed": None, "max_new_tokens": None, "logit_bias": None, "messages": None},
]
OPTIONS = GenerateOptions(max_new_tokens=8, batch_size=3, block_tokens=2, seed=5)


def written(folder, lines=LINES):
    path = folder / "in.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    return path


def answer(folder, lines=LINES, options=OPTIONS):
    return answer_prompts(LM, written(folder, lines), folder / "out.jsonl", options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return answer(folder), (folder / "out.jsonl").read_text()


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A folder with all answers in the partial file."""
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "finish", lambda self: None)
        answer(tmp_path)
    return tmp_path / "out.jsonl.partial"


def test_every_answer_is_that_of_its_prompt_alone(finished):
    report, content = finished
    assert (report.num_lines, report.num_before, report.errors) == (7, 0, {})
    for index, (line, got) in enumerate(zip(LINES, map(json.loads, content.splitlines()), strict=True)):
        given = {"max_new_tokens": 8, "seed": fold_seed(5, index)}
        given |= {name: value for name, value in line.items() if value is not None}
        prompt = given.pop("prompt", None) or given.pop("tokens")
        bias = {3: -50.0} if "logit_bias" in given else None
        alone = decodax.generate(LM, [prompt], **given | {"seed": [given["seed"]], "logit_bias": bias})
        assert got["index"] == index and got["tokens"] == alone.tokens[0].tolist() and got["text"] == alone.text[0]
        assert [got["seed"]] == alone.seeds and got["finish_reason"] == alone.finish_reasons[0]


def test_cut_off_anywhere_the_output_is_the_same_file(finished, unfinished, tmp_path):
    whole = unfinished.read_bytes()
    for end in np.random.default_rng(0).integers(0, len(whole) + 1, 6):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        unfinished.write_bytes(whole[:end])
        report = answer(tmp_path)
        assert (tmp_path / "out.jsonl").read_text() == finished[1] and not unfinished.exists()
        assert report.num_before == max(whole[:end].count(b"\n") - 1, 0)


BAD = {
    "no json": "no JSON: ",
    '{"prompt": "a", "stop": ["x"]}': "stop is for all lines: give it to the command",
    '{"prompt": "a", "logit_bias": {"--3": 1}}': "logit_bias: token ids must be in 0",
    "[1]": "an object with one of prompt, messages, tokens is expected",
    '{"prompt": "a", "tokens": [1]}': "an object with one of prompt, messages, tokens",
    '{"prompt": 3}': "prompt must be a text, got 3",
    '{"prompt": ""}': "the prompt is empty",
    '{"tokens": [99999]}': "token ids must be in 0",
    '{"tokens": "ab"}': "tokens must be a list of token ids",
    '{"messages": []}': "messages must be a list of messages",
    '{"messages": [{"role": "user", "content": "a"}]}': "has no chat template",
    '{"prompt": "a", "temprature": 1}': "has no option 'temprature': did you mean 'temperature'?",
    '{"prompt": "a", "strategy": "medusa"}': "strategy is for all lines",
    '{"prompt": "a", "temperature": -1}': "temperature must be",
    '{"prompt": "a", "temperature": [0.5]}': "temperature must be one value",
    '{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens must be a whole number",
    '{"prompt": "a", "seed": "x"}': "seed must be a whole number",
    json.dumps({"tokens": [1] * 5000}): "leaves room for at most",
}


def test_lines_that_cannot_be_read_have_an_error_and_the_others_go_on(tmp_path):
    report = answer(tmp_path, [*BAD, LINES[0]])
    for index, message in enumerate(BAD.values()):
        assert message in report.errors[index], (index, report.errors.get(index))
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in got] == list(range(len(BAD) + 1))
    assert all("error" in entry for entry in got[:-1]) and len(got[-1]["tokens"]) == 3


def test_an_output_of_another_run_is_refused(unfinished, tmp_path):
    for lines, options in ((LINES[1:], OPTIONS), (LINES, GenerateOptions(max_new_tokens=9, batch_size=3))):
        with pytest.raises(ValueError, match=r"partial belongs to another input, model or options: give the command"):
            answer(tmp_path, lines, options)
    unfinished.write_text("[]\n")
    with pytest.raises(ValueError, match=r"partial, line 1, is no answer that this program wrote: remove"):
        answer(tmp_path)
    unfinished.unlink()
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"out.jsonl exists already: name another file, or remove it"):
        answer(tmp_path)
    with pytest.raises(ValueError, match="is no folder: make it, or name another place"):
        answer_prompts(LM, written(tmp_path), tmp_path / "none" / "out.jsonl", OPTIONS)
    with pytest.raises(ValueError, match="has no prompts: a JSON object on each line"):
        read_prompt_file(LM, written(tmp_path, [""]), OPTIONS)


class FullDisk:
    def __init__(self, file):
        self._file, self._left = file, 3

    def write(self, content):
        self._left -= 1
        if self._left < 0:
            raise OSError(28, "No space left on device")
        self._file.write(content)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def test_one_process_writes_at_a_time(tmp_path):
    first = AnswerFile(tmp_path / "out.jsonl", "run")
    first.add(1, {})
    with pytest.raises(ValueError, match=r"another process writes .*out.jsonl.partial: wait for it, or name another"):
        AnswerFile(tmp_path / "out.jsonl", "run")
    first.add(0, {})
    first.finish()
    assert [json.loads(line)["index"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [0, 1]
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        AnswerFile(tmp_path, "run")


def test_other_weights_are_another_run(unfinished, tmp_path):
    params = {**LM.params, "embedding": LM.params["embedding"].at[0, 0].add(1e-3)}
    with pytest.raises(ValueError, match="belongs to another input, model or options"):
        answer_prompts(dataclasses.replace(LM, params=params), tmp_path / "in.jsonl", tmp_path / "out.jsonl", OPTIONS)


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch, finished):
    begin = AnswerFile.__init__

    def on_a_full_disk(self, path, run):
        begin(self, path, run)
        self._file = FullDisk(self._file)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "__init__", on_a_full_disk)
        with pytest.raises(OSError, match=r"cannot be written: No space left on device. The answers before are kept"):
            answer(tmp_path)
    assert answer(tmp_path).num_before == 3 and (tmp_path / "out.jsonl").read_text() == finished[1]


@pytest.mark.slow
def test_killed_at_random_moments_the_output_is_the_same_file(tmp_path):
    lines = [json.dumps({"prompt": f"def f{index}(x):", "max_new_tokens": 1 + index % 40}) for index in range(300)]
    source, whole, parts = written(tmp_path, lines), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    command = [
        sys.executable,
        "-m",
        "decodax",
        "generate",
        "--input",
        source,
        "--batch-size",
        "4",
        "--dtype",
        "float32",
    ]
    subprocess.run([*command, "--output", whole], check=True, capture_output=True)
    generator, num_kills = np.random.default_rng(1), 0
    while not parts.exists():
        process = subprocess.Popen([*command, "--output", parts], stderr=subprocess.DEVNULL)
        end = time.monotonic() + (generator.uniform(2, 9) if num_kills < 10 else 600)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            num_kills += 1
        process.wait()
    assert num_kills > 0 and parts.read_text() == whole.read_text()
