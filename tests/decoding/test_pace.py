"""A call of the compiled loop takes about half a second, by measured times, and the same tokens in every process."""

from itertools import pairwise

import pytest

from decodax.decoding import pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only on request, with the share of seconds spent compiling."""
    now = {"time": 100.0, "compiling": 7.0}
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now["time"])
    monkeypatch.setattr(pace, "compile_seconds", lambda: now["compiling"])
    return now


def call(paced, clock, seconds_per_token, *, most=10**6, compiling=0.0):
    with paced.measured(most) as tokens:
        clock["time"] += tokens * seconds_per_token + compiling
        clock["compiling"] += compiling
    return tokens


def test_calls_take_half_a_second_however_long_a_token_takes(clock):
    for seconds, expected in ((0.002, 250), (0.013, 38), (0.7, 1)):
        paced = pace.Pace(None, 0.1)
        tokens = [call(paced, clock, seconds) for _ in range(4)]
        assert tokens[0] == 5 and tokens[-1] == expected
        assert all(after <= 16 * before for before, after in pairwise(tokens))


def test_compiling_does_not_count(clock):
    paced = pace.Pace(None, 0.25)
    assert [call(paced, clock, 0.01, compiling=60.0), call(paced, clock, 0.01)] == [2, 32]


def test_no_more_than_requested(clock):
    paced = pace.Pace(None, 0.01)
    assert [call(paced, clock, 0.01, most=7) for _ in range(3)] == [7, 7, 7]
    assert call(paced, clock, 0.01) == 50


def test_calls_that_take_no_time_do_not_divide_by_zero(clock):
    assert call(pace.Pace(None, 0.0), clock, 0.0) >= 1


def test_processes_of_one_run_make_the_same_calls(clock, monkeypatch):
    monkeypatch.setattr(pace, "spans_processes", lambda mesh: True)
    paced = pace.Pace(None, 0.25)
    assert [call(paced, clock, seconds) for seconds in (0.001, 0.1, 10.0)] == [64, 64, 64]
