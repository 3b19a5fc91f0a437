"""Rows of a training step hold each token about once per pass, and depend on the number of the step alone."""

from dataclasses import replace

import numpy as np
import pytest

from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_windows import TextWindows, cut

PLAN = Plan(steps=8, decay_from=5, long_from=6, windows_per_step=2, window_tokens=14, short_tokens=7)


def documents(seed, count):
    """Token ids from 1 on in rising runs, different in every document."""
    draw = np.random.default_rng(seed)
    return [(1 + (draw.integers(30) + np.arange(draw.integers(20, 40))) % 30).astype(np.int32) for _ in range(count)]


TEXTS, ROTATING = documents(0, 5), documents(1, 7)


def windows(plan=PLAN, rotating=ROTATING, share=0.1):
    return TextWindows(TEXTS, plan, rotating=rotating, rotating_share=share, separator=(0,))


def test_a_pass_uses_every_token_about_once():
    rows = windows(replace(PLAN, long_from=10**6), share=0.0)
    count = len(rows.one_pass(0))
    read = np.concatenate([rows.at(step)[:, :-1].ravel() for step in range(count // PLAN.windows_per_step)])
    there = np.concatenate([np.append(0, ids) for ids in TEXTS])
    missing = np.bincount(there, minlength=31) - np.bincount(read, minlength=31)
    # Tokens that fill no window, and windows that fill no step, are left out; nothing is used twice.
    assert missing.min() >= 0 and missing.sum() <= PLAN.tokens_per_step


def test_windows_follow_one_another_and_share_only_the_target_of_the_last_token():
    assert cut(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert cut(np.arange(7), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert cut(np.arange(6), 3).tolist() == [[0, 1, 2, 3]]


def test_rows_have_the_plan_s_shape_and_overlap_by_their_targets():
    rows = windows()
    short, long = rows.at(PLAN.long_from - 1), rows.at(PLAN.long_from)
    assert short.shape == (4, 8) and long.shape == (2, 15)
    assert (short[0, -1], short[2, -1]) == (short[1, 0], short[3, 0])  # two halves of one window


def test_a_step_s_rows_follow_from_the_step_alone():
    forwards, backwards = windows(), windows()
    steps = range(30)  # several passes
    expected = [forwards.at(step) for step in steps]
    for step in reversed(steps):
        np.testing.assert_array_equal(backwards.at(step), expected[step])
    assert not np.array_equal(windows(replace(PLAN, seed=1)).at(0), expected[0])


def test_passes_rotate_through_the_rest():
    marked = [np.full(20, 40 + i, np.int32) for i in range(8)]
    rows = windows(rotating=marked, share=0.25)
    for number in range(4):
        seen = set(np.unique(rows.one_pass(number))) - set(range(31))
        assert seen <= {40 + number, 44 + number} and seen  # a quarter of eight, another one in each pass


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"more tokens than one step reads \(4096\), got"):
        TextWindows(TEXTS, Plan())
    with pytest.raises(ValueError, match="need 8, got 7"):
        cut(np.arange(7), 7)
