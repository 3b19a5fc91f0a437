"""The judge of the fuzz tests finds each kind of failure where it is planted."""

import time
import warnings

import pytest

from tests.fuzz import damage, isolated, verdict
from tests.fuzz.damage import Allowed
from tests.fuzz.folders import check_loads, copy_of, differences, golden_model
from tests.fuzz.verdict import Case, Outcome, WrongResult, judge


def _raise(error):
    raise error


def _verdict(act, **options):
    return judge(Case("subject/base/kind:field", act, (("config.json",), ("head_dim", "hidden_size")), **options))


def test_a_clear_refusal_and_a_right_result():
    assert _verdict(lambda: None).outcome is Outcome.RIGHT
    clear = ValueError("x/config.json: head_dim must be a whole number from 1 on, got -1")
    assert _verdict(lambda: _raise(clear)).outcome is Outcome.REFUSED
    listed = ValueError(
        "x/config.json: this config cannot be used:\n  - head_dim is missing\n  - vocab_size is missing"
    )
    assert _verdict(lambda: _raise(listed)).outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    "error, why",
    [
        (KeyError("head_dim in config.json"), "bare KeyError"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "config.json head_dim"), "bare UnicodeDecodeError"),
        (MemoryError(), "no message"),
        (ValueError("config.json: must be positive"), "does not name head_dim"),
        (ValueError("head_dim must be positive"), "does not name config.json"),
        (ValueError("config.json: head_dim\nis wrong"), "several lines"),
        (ValueError("config.json: head_dim \x1b[2J"), "control characters"),
        (ValueError("config.json: head_dim " + "x" * 4_000), "too long"),
        (ValueError("config.json: head_dim: KeyError('x')"), "speaks of the code"),
        (ValueError("config.json: head_dim, num_kept_groups_inside is 2"), "names num_kept_groups_inside"),
        (WrongResult("another model"), "another model"),
    ],
)
def test_unclear_messages_are_found(error, why):
    found = _verdict(lambda: _raise(error))
    assert found.outcome is Outcome.WRONG
    assert why in found.said


def test_words_of_the_input_may_be_quoted():
    error = ValueError("config.json: head_dim: num_kept_groups_inside is not understood")
    assert _verdict(lambda: _raise(error), given=b'{"num_kept_groups_inside": 1}').outcome is Outcome.REFUSED


def _busy():
    while True:
        pass


def test_time_and_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(verdict, "SECONDS", 0.2)
    assert "has not ended" in _verdict(lambda: time.sleep(5)).said
    assert "has not ended" in _verdict(_busy).said
    assert "bare MemoryError" in _verdict(lambda: bytes(2**32)).said
    monkeypatch.setattr(verdict, "MAX_GROWTH_BYTES", 2**20)
    monkeypatch.setattr(verdict, "peak_bytes", iter([0, 2**21]).__next__)
    assert "2 MiB of memory" in _verdict(lambda: None).said


def test_a_warning_must_be_clear_too():
    assert _verdict(lambda: warnings.warn("one line", stacklevel=1)).outcome is Outcome.RIGHT
    assert "a warning" in _verdict(lambda: warnings.warn("two\nlines", stacklevel=1)).said


def test_cases_run_without_the_checks_of_the_session():
    from decodax.decoding.options import GenerateOptions

    assert "'5'" in _verdict(lambda: GenerateOptions(max_new_tokens="5")).said


def test_another_model_is_found(tmp_path):
    right, folder = golden_model("llama"), copy_of("llama", tmp_path)
    assert differences(check_loads(folder, right, Allowed.HARMLESS), right) == []
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")  # the lowest bits of one number
    with pytest.raises(WrongResult, match=r"another model \(weights of"):
        check_loads(folder, right, Allowed.SAME)
    with pytest.raises(WrongResult, match="should have been refused"):
        check_loads(folder, right, Allowed.NOTHING)
    file.write_bytes(b"")
    with pytest.raises(WrongResult, match="nothing was damaged"):
        check_loads(folder, right, Allowed.HARMLESS)


def test_damage_is_the_same_for_the_same_seed():
    content = bytes(range(256))
    first, second = (list(damage.byte_damages(content, range(12))) for _ in range(2))
    assert first == second
    assert len({one.content for one in first}) == 12 and all(one.content != content for one in first)


def test_every_value_of_a_tree_is_damaged_and_the_tree_itself_stays():
    tree = {"a": {"b": [1, 2.5]}, "c": None, "d": "text"}
    kinds = [one.kind for one in damage.tree_damages(tree)]
    assert {"drop:a", "drop:a/b/0", "negate:a/b/1", "retype:number:c", "huge:text:d", "null:a/b"} <= set(kinds)
    assert len(kinds) == len(set(kinds))
    assert tree == {"a": {"b": [1, 2.5]}, "c": None, "d": "text"}


def test_a_case_that_ends_or_blocks_its_process_is_named(monkeypatch):
    """With a stand-in for the process, which prints what the real one would."""
    script = (
        "import json, os, sys, time\n"
        "for name in json.load(open(sys.argv[2])):\n"
        "    print(json.dumps({'name': name}), flush=True)\n"
        "    os.abort() if name == 'ends' else time.sleep(60) if name == 'blocks' else None\n"
        "    print(json.dumps({'name': name, 'outcome': 'right', 'said': ''}), flush=True)\n"
    )
    monkeypatch.setattr(isolated, "COMMAND", ("-c", script))
    monkeypatch.setattr(isolated, "SILENT_SECONDS", 2.0)
    names = ["first", "ends", "between", "blocks", "last"]
    verdicts = isolated.judge_isolated("subject", names).verdicts
    assert [one.name for one in verdicts] == names
    assert [one.outcome is Outcome.WRONG for one in verdicts] == [False, True, False, True, False]
    assert "code -6" in verdicts[1].said and "fell silent" in verdicts[3].said
