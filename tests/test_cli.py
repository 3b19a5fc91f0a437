"""The command line: what it prints, what it passes to the library, and how it fails."""

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import decodax
from decodax.catalogue import KINDS, catalogue, module_of
from decodax.cli.app import app
from decodax.cli.bench import weight_bytes_per_step
from decodax.cli.generate import generate as generate_command
from decodax.cli.methods import table
from decodax.decoding.generated import Generation, Stats
from decodax.decoding.options import GenerateOptions
from tests.golden_files import load_golden

ROOT = Path(__file__).resolve().parents[1]
# One for each of the 67 tokens of the golden model, so that what transformers computed for it can be spelt.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
GOLDEN = load_golden("llama")
# Each option of `decodax.generate`: its text on the command line, and the value that must arrive.
PASSED_ON = {
    "n": (["--n", "1"], 1),
    "max_new_tokens": (["--max-new-tokens", "3"], 3),
    "min_new_tokens": (["--min-new-tokens", "2"], 2),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "7"], 7),
    "top_p": (["--top-p", "0.25"], 0.25),
    "min_p": (["--min-p", "0.125"], 0.125),
    "typical_p": (["--typical-p", "0.75"], 0.75),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5),
    "frequency_penalty": (["--frequency-penalty", "1.25"], 1.25),
    "logit_bias": (["--logit-bias", "5=-2.5", "--logit-bias", "1=-inf"], {5: -2.5, 1: float("-inf")}),
    "stop": (["--stop", "ab", "--stop", "c"], ("ab", "c")),
    "stop_token_ids": (["--stop-token-ids", "3,11"], [3, 11]),
    "seed": (["--seed", "13"], 13),
    "strategy": (["--strategy", "autoregressive"], "autoregressive"),
    "draft": (["--draft", "some/folder"], "some/folder"),
    "draft_tokens": (["--draft-tokens", "6"], 6),
    "block_tokens": (["--block-tokens", "5"], 5),
    "batch_size": (["--batch-size", "3"], 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that reads and writes single characters."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(load_golden("llama").folder, folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def spelt(tokens):
    return "".join(CHARACTERS[token] for token in tokens)


def golden_row(row, number):
    """A prompt of the golden model, and the first `number` tokens with which transformers continued it."""
    return GOLDEN.tokens[row, : GOLDEN.length[row]], GOLDEN.generated[row, :number]


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def generate(folder, *arguments, stdin=None):
    return run("generate", "--no-compilation-cache", "--model", folder, *arguments, stdin=stdin)


@pytest.fixture
def recorded(monkeypatch):
    """The calls of `decodax.generate`, which then generates nothing."""
    calls = []

    def record(lm, prompts, **options):
        calls.append((lm, prompts, options))
        stats = Stats(1, 0, 1, 0, 0.5, 0.25, 0.125, "autoregressive", 8, 0, 0)
        rows = [np.zeros(0, np.int32) for _ in prompts]
        return Generation(rows, ["" for _ in prompts], rows, ["length" for _ in prompts], [0 for _ in prompts], stats)

    monkeypatch.setattr(decodax, "generate", record)
    return calls


def test_the_command_has_every_option_of_the_library_and_no_other():
    own = {"prompts", "file", "model", "dtype", "invariant", "adapter", "compilation_cache", "as_json", "debug"}
    own |= {"mesh", "distributed", "num_processes", "process_id", "join_timeout"}  # options of devices and processes
    parameters = set(inspect.signature(generate_command).parameters)
    own |= {"source", "target"}  # tests/test_cli_prompt_files.py
    own |= {"chat", "system"}  # what makes messages of prompts; none of them is the model's own, to be continued
    only_in_programs = {"on_text", "logits_processors", "continue_final_message"}
    assert parameters - own == {field.name for field in dataclasses.fields(GenerateOptions)} - only_in_programs
    for_conversations = {"tools", "documents", "chat_template", "chat_template_kwargs"}  # tests/test_cli_chat.py
    assert parameters - own == set(PASSED_ON) | for_conversations


@pytest.mark.parametrize("name", PASSED_ON)
def test_an_option_reaches_the_library(name, folder, recorded):
    arguments, expected = PASSED_ON[name]
    assert generate(folder, "ab", *arguments).exit_code == 0
    assert recorded[0][2][name] == expected


def test_without_options_the_defaults_are_the_library_s(folder, recorded):
    assert generate(folder, "ab", "cd").exit_code == 0
    _, prompts, options = recorded[0]
    assert prompts == ["ab", "cd"]
    assert GenerateOptions(**options) == GenerateOptions()


def test_no_stop_tokens_differs_from_the_default(folder, recorded):
    generate(folder, "ab", "--stop-token-ids", "")
    assert recorded[0][2]["stop_token_ids"] == []


def test_dtype_and_model_reach_the_loader(folder, recorded):
    assert generate(folder, "ab", "--dtype", "bfloat16").exit_code == 0
    lm = recorded[0][0]
    assert lm.path == folder
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}


def test_prompts_come_from_arguments_files_and_stdin(folder, recorded, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"from a file\n")
    assert generate(folder, "ab", "--file", file, "--file", "-", stdin="piped\n").exit_code == 0
    assert generate(folder, "-", "ab", stdin="piped").exit_code == 0
    assert [call[1] for call in recorded] == [["ab", "from a file\n", "piped\n"], ["piped", "ab"]]


def logprobs(folder, prompt, output):
    """Log-probabilities of the output's tokens, from one forward of the whole text, in float64."""
    lm, tokens = decodax.load(folder), np.concatenate([prompt, output])
    hidden = lm.model.apply(lm.params, jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None]).hidden
    logits = np.asarray(lm.model.logits(lm.params, hidden), np.float64)[0, len(prompt) - 1 : -1]
    return logits[np.arange(len(output)), output] - np.log(np.exp(logits).sum(axis=1))


def test_one_prompt_is_streamed_and_the_json_has_what_transformers_generates(folder):
    prompt, output = golden_row(0, 5)
    options = (spelt(prompt), "--max-new-tokens", 5, "--stop-token-ids", "")
    streamed = generate(folder, *options, "--block-tokens", 2)
    assert streamed.stdout == f"{spelt(prompt)}{spelt(output)}\n"
    assert streamed.stderr.startswith("5 new tokens in ") and streamed.stderr.count("\n") == 1

    printed = generate(folder, *options, "--json")
    assert printed.exit_code == 0 and printed.stderr == ""
    document = json.loads(printed.stdout)
    assert document["prompts"] == [spelt(prompt)]
    assert document["text"] == [spelt(output)]
    assert document["tokens"] == [output.tolist()]
    np.testing.assert_allclose(document["logprobs"], [logprobs(folder, prompt, output)], atol=2e-5)
    assert document["finish_reasons"] == ["length"]
    assert document["stats"]["num_new_tokens"] == 5 and document["stats"]["prefill_seconds"] > 0
    assert document["model"]["path"] == str(folder)
    assert document["versions"]["decodax"] == decodax.__version__


def test_a_strategy_with_a_draft(folder):
    plain = generate(folder, "abc", "--max-new-tokens", 9)
    arguments = ("--max-new-tokens", 9, "--strategy", "draft_model", "--draft", folder, "--draft-tokens", 2)
    drafted = generate(folder, "abc", *arguments)
    assert drafted.stdout == plain.stdout
    assert "draft_model, 3.00 tokens per forward" in drafted.stderr
    stats = json.loads(generate(folder, "abc", *arguments, "--json").stdout)["stats"]
    assert stats["accepted_lengths"] == [0, 0, 3] and stats["acceptance_per_position"] == [1, 1]
    result = generate(folder, "abc", "--strategy", "draft_model")
    assert result.exit_code == 1 and "needs a draft for tiny" in result.stderr


def test_the_invariant_mode_gives_the_same(folder):
    plain = generate(folder, "abc", "--max-new-tokens", 9)
    assert generate(folder, "abc", "--max-new-tokens", 9, "--invariant").stdout == plain.stdout


def test_several_prompts_follow_one_another(folder):
    first, second = ((spelt(prompt), spelt(output)) for prompt, output in (golden_row(0, 5), golden_row(2, 5)))
    printed = generate(folder, first[0], second[0], "--max-new-tokens", 5)
    assert printed.stdout == f"{''.join(first)}\n\n{''.join(second)}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a prompt is needed"),
        (["ab", "--temperature", "-1"], "temperature"),
        (["ab", "--max-new-tokens", "0"], "max_new_tokens"),
        (["ab", "--top-p", "1.5"], "top_p"),
        (["ab", "--strategy", "magic"], "autoregressive"),
        (["ab", "--draft-tokens", "many"], "a whole number or auto"),
        (["ab", "--stop-token-ids", "one"], "whole numbers"),
        (["ab", "--stop-token-ids", "99999"], "stop_token_ids must be token ids in 0.."),
        (["ab", "--logit-bias", "5"], "7=-2.5"),
        (["ab", "--no-such-option"], "--no-such-option"),
        (["-", "--file", "-"], "stdin"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, said, folder):
    result = generate(folder, *arguments, stdin="x")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ab", "--model", "/no/such/folder"], "no such model folder: /no/such/folder"),
        (["ab", "--file", "/no/such/prompt"], "/no/such/prompt"),
        ([""], "prompt 0 is empty"),
        (["ab", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_a_failure_is_one_line_and_ends_with_1(arguments, said, folder):
    result = generate(folder, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert result.stdout == ""


def test_a_prompt_that_is_not_text_is_refused(folder, tmp_path):
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe\x00")
    result = generate(folder, "--file", file)
    assert result.exit_code == 1 and f"{file} must be text in UTF-8" in result.stderr


def test_an_error_holds_no_terminal_escapes():
    result = run("generate", "ab", "--model", "no\x1b[31m\udcff", "--no-compilation-cache")
    assert "no\\x1b[31m\\udcff" in result.stderr and "\x1b" not in result.stderr


def test_debug_shows_the_traceback():
    result = run("generate", "ab", "--model", "/no/such/folder", "--debug", "--no-compilation-cache")
    assert isinstance(result.exception, FileNotFoundError)


def test_rows_that_became_nan_end_with_1(folder, monkeypatch):
    rows = [np.zeros(0, np.int32)] * 3
    stats = Stats(1, 0, 1, 0, 0.5, 0.25, 0.125, "autoregressive", 8, 0, 0)
    out = Generation(rows, ["", "", ""], rows, ["length", "failed", "stop"], [0, 1, 2], stats)
    monkeypatch.setattr(decodax, "generate", lambda *_, **__: out)
    result = generate(folder, "a", "b", "c")
    assert result.exit_code == 1 and "NaN or infinite in row 1" in result.stderr


def test_an_interruption_ends_with_130(folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(decodax, "generate", interrupt)
    assert generate(folder, "a", "--json").exit_code == 130


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(folder):
    result = generate(folder, "a", "--top-k", 3, "--max-new-tokens", 1)
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if "warn" in line.lower()] == [
        "warning: top_k changes nothing at temperature 0 (greedy): set temperature above 0 to sample"
    ]


def test_bench_measures_every_batch_size(folder, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # it switches the compilation cache off for good
    arguments = ("--model", folder, "--batch", "1,3", "--prompt-tokens", 7, "--new-tokens", 5, "--repetitions", 1)
    result = run("bench", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    num_bytes = weight_bytes_per_step(decodax.load(folder))
    for row in rows:
        assert row["prompt_tokens"] == 7 and row["new_tokens"] == 5
        assert row["weights_gigabytes_per_second"] == pytest.approx(num_bytes / row["milliseconds_per_step"] / 1e6)
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["milliseconds_per_step"])
        assert row["prefill_tokens_per_second"] > 0
    assert run("bench", "--batch", "1,x").exit_code == 2


def test_an_embedding_counts_as_read_only_where_it_is_tied_to_the_head():
    for case, counted in (("llama", False), ("llama_tied", True)):
        lm = decodax.load(load_golden(case).folder)
        assert lm.config.tie_embeddings == counted
        without = lm.nbytes - lm.params["embedding"].nbytes
        assert weight_bytes_per_step(lm) == (lm.nbytes if counted else without)


def test_methods_lists_the_catalogue():
    rows = json.loads(run("methods", "--json").stdout)
    assert rows == [dataclasses.asdict(row) | {"options": list(row.options)} for row in catalogue()]
    assert set(rows[0]) == {"name", "kind", "folder", "paper", "lossless", "auxiliary_weights", "test", "options"}
    assert next(row["options"] for row in rows if row["name"] == "medusa") == ["draft_tokens=16", "epsilon=None"]


def test_methods_are_a_line_each_in_a_pipe():
    lines = run("methods").stdout.splitlines()
    rows = catalogue()
    assert [line.split()[0] for line in lines] == [row.name for row in rows]
    kinds = {line.index(f"  {row.kind}  ") for line, row in zip(lines, rows, strict=True)}
    assert len(kinds) == 1 and all(line.isascii() for line in lines)
    for line, row in zip(lines, rows, strict=True):
        assert ("lossless" in line.split()) == row.lossless
        assert (row.paper or "-") in line and (row.auxiliary_weights or "") in line


def test_methods_fit_a_terminal():
    rows = catalogue()
    for width in (20, 80, 120):
        shown = [line for line in table(rows, width) if line.startswith("  ")][1:]
        assert len(shown) == len(rows) and all(len(line) <= width for line in shown)
        assert all(f" {row.name} " in line for line, row in zip(shown, rows, strict=True) if width >= 80)
        assert not any(line.endswith("...") and len(line) < width for line in shown)
    (medusa,) = (line for line in table(rows, 80) if line.startswith("  medusa "))
    assert medusa.split()[1:] == ["yes", "yes", "2401.10774", "Medusa"]


def test_every_method_s_file_and_test_exist():
    for kind in KINDS:
        for name, method in kind.methods.items():
            file = ROOT / (module_of(kind, name, method).removeprefix("decodax.").replace(".", "/") + ".py")
            assert file.is_file(), (kind.name, name)
    for row in catalogue():
        assert (ROOT / row.folder).is_dir(), row
        assert (ROOT / row.test).is_file(), row


def test_rows_of_methods_list_their_facts():
    rows = {(row.kind, row.name): row for row in catalogue()}
    assert rows["strategy", "autoregressive"].lossless
    assert rows["strategy", "draft_model"].paper == (
        "Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192)"
    )
    assert rows["strategy", "draft_model"].auxiliary_weights is not None
    assert rows["strategy", "prompt_lookup"].auxiliary_weights is None
    in_checkpoint = ("mtp", "mtp_head")  # trained with the model itself, and stored with it
    trained = [row for row in rows.values() if row.auxiliary_weights and row.name not in in_checkpoint]
    assert all("`decodax train " in row.auxiliary_weights for row in trained)
    assert rows["verifier", "chain_rejection"].lossless and not rows["verifier", "typical_acceptance"].lossless
    assert rows["drafter", "prompt_lookup"].test == "tests/decoding/drafters/test_prompt_lookup.py"
    assert not rows["logits processor", "top_k"].lossless
    assert rows["logits processor", "top_k"].paper == "Hierarchical Neural Story Generation (arXiv 1805.04833)"
    assert rows["family", "llama"].folder == "models/families"
    assert rows["family", "llama"].paper.startswith("LLaMA (arXiv 2302.13971); Llama 2 (arXiv 2307.09288); ")
    assert rows["position scaling", "yarn"].paper == "YaRN (arXiv 2309.00071)"
    assert rows["position scaling", "dynamic"].paper is None  # not those of the other scalings in its file


# Separate processes, where the full start matters. They see no accelerator and none of this session's settings.


def process(*arguments, **environment):
    command = [sys.executable, "-m", "decodax", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_the_second_start_finds_all_that_the_first_compiled(tmp_path):
    """Also the README's command: the embedded model, found without a name, offline."""
    arguments = ("generate", "def fibonacci(n):", "--max-new-tokens", "20")
    cache = tmp_path / "decodax" / "xla"
    offline = {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    first = process(*arguments, **offline)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def fibonacci(n):")
    compiled = {file for file in cache.rglob("*-cache")}
    assert compiled
    second = process(*arguments, **offline)
    assert second.stdout == first.stdout
    assert {file for file in cache.rglob("*-cache")} == compiled


def test_the_version_is_printed():
    assert process("--version").stdout == f"decodax {decodax.__version__}\n"


@pytest.mark.slow
def test_a_cache_of_damaged_programs_is_repaired(tmp_path):
    arguments = ("generate", "def f(", "--max-new-tokens", "2")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    first = process(*arguments, **environment)
    for file in tmp_path.rglob("*-cache"):
        os.truncate(file, file.stat().st_size // 2)
    second, third = (process(*arguments, **environment) for _ in range(2))
    assert first.stdout == second.stdout == third.stdout
    assert [done.stderr.count("warning") for done in (first, second, third)] == [0, 1, 0]
