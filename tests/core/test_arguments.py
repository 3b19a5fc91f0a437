"""Arguments of any library become Python values, or are refused in one line that names the argument."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core import arguments


class Silent:
    """Fails whatever is asked of it."""

    ndim = 1

    def __repr__(self):
        raise RuntimeError("no repr")

    def __iter__(self):
        raise RuntimeError("no entries")

    def tolist(self):
        raise RuntimeError("no list")


def test_examples():
    assert doctest.testmod(arguments).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[2J", r"'a\x1b[2J'"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        (np.arange(12).reshape(2, 6), "array([[ 0, 1, 2, 3, 4, 5], [ 6, 7, 8, 9, 10, 11]])"),
        ([10**5000], "a value of type list"),
        ("\ud800", r"'\ud800'"),
    ],
)
def test_a_value_is_shown_in_one_short_line(value, text):
    assert arguments.shown(value) == text


def test_any_value_is_shown_in_one_short_line():
    for value in (Silent(), [Silent()], "x" * 10**6, {key: [key] * 99 for key in range(99)}, jax.random.key(0), Silent):
        text = arguments.shown(value)
        assert "\n" not in text and len(text) <= 200


def test_numbers_and_lists_of_other_libraries_become_python_values():
    for value in (np.int64(7), np.array(7), jnp.int32(7), np.uint8(7)):
        assert type(arguments.plain(value)) is int and arguments.plain(value) == 7
    for value in (np.array([0.5, 2]), jnp.array([0.5, 2], jnp.bfloat16), jnp.array([0.5, 2])):
        assert arguments.plain(value) == [0.5, 2]
    assert arguments.plain(np.array("text")) == "text"
    deleted = jnp.arange(3)
    deleted.delete()
    for value in (deleted, Silent(), Silent, b"bytes", memoryview(b"bytes"), None):
        assert arguments.plain(value) is value
    jax.jit(lambda traced: np.testing.assert_(arguments.plain(traced) is traced))(jnp.arange(3))


def test_lists_of_every_kind():
    entries = (3, 5)
    kinds = (list, tuple, np.array, jnp.array, iter, dict.fromkeys, lambda entries: (entry for entry in entries))
    for kind in (*kinds[:5], kinds[6]):
        assert arguments.listed(kind(entries)) == arguments.in_order(kind(entries)) == [3, 5]
    assert arguments.listed(range(3, 6, 2)) == [3, 5] == arguments.listed([jnp.int32(3), np.array(5)])
    assert arguments.listed({3}) == [3] and arguments.in_order({3}) is None
    for single in (7, "ab", b"ab", {"a": 1}, None, Silent(), jax.random.key(0)):
        assert arguments.listed(single) is None

    def fails():
        yield 1
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        arguments.listed(fails())


NO_NUMBERS = (True, np.True_, "3", None, [3], 2.5, float("nan"), float("inf"), 1j, b"3", {}, Silent(), np.array([3]))


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1, -(10**30)])
def test_values_that_are_not_whole_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"^size must be a whole number, at least 2, or 'auto', got .+$"):
        arguments.whole_number("size", value, least=2, otherwise=", or 'auto'")


def test_whole_numbers():
    for value in (7, 7.0, np.float32(7), np.uint8(7), jnp.int32(7), np.array(7)):
        assert type(arguments.whole_number("size", value, least=7)) is int
    assert arguments.whole_number("size", 10**5000, least=1) == 10**5000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("7", r"ids must be a list of token ids \(integers\), got '7'$"),
        (7, r"ids must be a list of token ids \(integers\), got 7$"),
        ([[7]], r"ids must be a list of token ids \(integers\), got \[\[7\]\]$"),
        ([7, None], r"\(integers\), got \[7, None\]$"),
        ([7, True], r"\(integers\), got \[7, True\]$"),
        ([7.0], r"\(integers\), got \[7\.0\]$"),
        (b"7", r"\(integers\), got b'7'$"),
        ([3, 13, 99], r"ids must be token ids in 0\.\.12 \(the vocabulary\), got 13$"),
        ([-1], r"\(the vocabulary\), got -1$"),
        ([10**400], r"\(the vocabulary\), got 10+\.\.\.0+$"),
    ],
)
def test_values_that_are_not_token_ids_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        arguments.token_ids("ids", value, vocab_size=13)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "stop must be one or more non-empty strings, got 5"),
        (["a", ""], r"stop must be one or more non-empty strings, got \['a', ''\]"),
        ([b"a"], "non-empty strings"),
        ({"a": 1}, "non-empty strings"),
        (["a", "b\udce9"], r"stop must be text, and its character 1 is the lone surrogate '\\udce9'.*errors='replace'"),
    ],
)
def test_values_that_are_not_texts_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        arguments.strings("stop", value)


def test_texts():
    for value in (["a", "b"], ("a", "b"), np.array(["a", "b"]), iter("ab"), itertools.chain("a", "b")):
        assert arguments.strings("stop", value) == ("a", "b")
    assert arguments.strings("stop", "") == arguments.strings("stop", []) == ()


def test_folders(tmp_path):
    assert arguments.folder_name("draft", str(tmp_path)) == str(tmp_path)
    assert arguments.folder_name("draft", tmp_path) == tmp_path
    for value in (5, b"folder", None, [str(tmp_path)], True):
        with pytest.raises(
            ValueError, match=r"^draft must be the path of a folder, as text or pathlib.Path, or x, got "
        ):
            arguments.folder_name("draft", value, ", or x")
    for value in ("a" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="draft must be a path that this system allows"):
            arguments.folder_name("draft", value)


def test_flags_and_choices():
    assert arguments.flag("invariant", np.True_) is True and arguments.flag("invariant", False) is False
    for value in (0, 1, "yes", None):
        with pytest.raises(ValueError, match="invariant must be True or False, got"):
            arguments.flag("invariant", value)
    for value in ("XLA", ["xla"], {}, 3):
        with pytest.raises(ValueError, match="implementation must be one of xla, gpu, got"):
            arguments.choice("implementation", value, ("xla", "gpu"))
