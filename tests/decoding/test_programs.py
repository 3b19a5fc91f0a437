"""Compiled programs are kept up to a bound, least recently used first out, and evicted ones free their memory."""

import gc

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding import programs
from decodax.decoding.programs import bounded_jit, num_programs


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Starts without programs of other tests."""
    monkeypatch.setattr(programs, "_programs", type(programs._programs)())
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 3)


def counted():
    """A function and the shapes it was traced for."""
    traced = []

    @bounded_jit(static_argnums=(0,))
    def double(factor, x):
        traced.append((factor, x.shape))
        return factor * x

    return double, traced


def test_one_program_per_signature():
    double, traced = counted()
    for factor, size in ((2.0, 3), (2.0, 3), (2.0, 5), (3.0, 3), (2.0, 5)):
        np.testing.assert_array_equal(double(factor, np.ones(size, np.float32)), np.full(size, factor, np.float32))
    assert traced == [(2.0, (3,)), (2.0, (5,)), (3.0, (3,))]
    double(2.0, np.ones(3, np.int32).astype(np.float16))
    assert len(traced) == 4


def test_evicts_the_least_recently_used_program():
    double, traced = counted()
    for size in (1, 2, 3, 1, 4, 1, 2):  # 4 takes the place of 2, which then takes that of 3
        double(2.0, np.ones(size, np.float32))
        assert num_programs() <= 3
    assert [shape for _, (shape,) in traced] == [1, 2, 3, 4, 2]


def live_programs():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


@pytest.mark.slow
def test_evicted_programs_free_their_memory():
    double, traced = counted()
    sizes = []
    for size in range(1, 12):
        double(2.0, np.ones(size, np.float32))
        sizes.append(live_programs())
    assert len(traced) == 11
    assert sizes[10] == sizes[2], f"the number of programs must level off at the bound, got {sizes}"


def test_evicts_several_where_memory_maps_run_short(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 100)
    double, _ = counted()
    for size in range(1, 9):
        double(2.0, np.ones(size, np.float32))
    monkeypatch.setattr(programs, "_maps_run_short", lambda: True)
    double(2.0, np.ones(9, np.float32))
    assert num_programs() == 8 - 2 + 1


def test_counts_maps_against_the_limit(tmp_path, monkeypatch):
    for name, lines in (("_MAPS", 11), ("_MAX_MAPS", 0)):
        file = tmp_path / name
        file.write_text("x\n" * lines if lines else "20\n")
        monkeypatch.setattr(programs, name, file)
    assert programs._maps_run_short()
    (tmp_path / "_MAX_MAPS").write_text("22\n")
    assert not programs._maps_run_short()
    monkeypatch.setattr(programs, "_MAPS", tmp_path / "absent")
    assert not programs._maps_run_short()


def test_donates():
    @bounded_jit(donate_argnums=(0,))
    def add(x):
        return x + 1

    x = jax.device_put(np.ones(7, np.float32))
    add(x)
    assert x.is_deleted()


def test_options_share_the_prefill_program(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 100)
    lm, prompt = decodax.load(), list(range(40, 60))
    decodax.generate(lm, [prompt], max_new_tokens=2)
    before = num_programs()
    decodax.generate(lm, [prompt], max_new_tokens=2, temperature=0.7, presence_penalty=0.5)
    assert num_programs() == before + 2  # an empty state and a loop, but no other prefill
