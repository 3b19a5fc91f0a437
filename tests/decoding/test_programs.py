"""Compiled programs are kept up to a bound, least recently used first out, and evicted ones free their memory."""

import contextlib
import dataclasses
import gc
import threading
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding import programs, ready_strategy
from decodax.decoding.compile_clock import compile_seconds
from decodax.decoding.programs import BoundedJit, bounded_jit, num_programs
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from tests.tiny import tiny_config


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


def test_a_program_prepared_elsewhere_is_found():
    double, traced = counted()
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    out = double.prepare(2.0, shape)
    assert (out.shape, out.dtype) == ((3,), np.float32) and double.prepare(2.0, shape) is None
    np.testing.assert_array_equal(double(2.0, np.ones(3, np.float32)), np.full(3, 2.0))
    assert traced == [(2.0, (3,))] and num_programs() == 1


def test_a_call_waits_for_the_thread_that_compiles_its_program():
    """Its time counts as compiling; where that thread fails, the call compiles, or fails, by itself."""
    begun, may_end, traced = threading.Event(), threading.Event(), []

    @bounded_jit()
    def slow(x):
        traced.append(threading.current_thread().name)
        if threading.current_thread().name == "elsewhere":
            begun.set()
            may_end.wait(30)
        if x.shape == (4,):
            raise ValueError("four")
        return x + 1

    for size, trials in ((3, 1), (4, 2)):
        begun.clear(), may_end.clear(), traced.clear()
        shape = jax.ShapeDtypeStruct((size,), np.float32)
        thread = threading.Thread(target=lambda shape=shape: quietly(slow.prepare, shape), name="elsewhere")
        thread.start()
        assert begun.wait(30)
        threading.Timer(0.2, may_end.set).start()
        before = compile_seconds()
        if size == 3:
            np.testing.assert_array_equal(slow(np.zeros(3, np.float32)), np.ones(3))
            assert compile_seconds() - before > 0.1
        else:
            with pytest.raises(ValueError, match="four"):
                slow(np.zeros(4, np.float32))
        thread.join()
        assert len(traced) == trials


def quietly(function, *arguments):
    with contextlib.suppress(ValueError):
        function(*arguments)


@pytest.mark.parametrize("strategy", [None, "prompt_lookup"])
def test_a_deep_model_compiles_its_loop_beside_the_prompts_program_and_once(strategy, monkeypatch, caplog):
    block = tiny_config().blocks[0]
    model = Model(dataclasses.replace(tiny_config(), blocks=(block,) * 12))
    lm = LanguageModel(model, model.config, model.init(jax.random.key(0)), None, Path("deep"), ())
    ahead, real = [], BoundedJit.prepare

    def prepare(self, *given):
        ahead.append(self.__name__)
        return real(self, *given)

    monkeypatch.setattr(BoundedJit, "prepare", prepare)
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 64)
    monkeypatch.setattr(ready_strategy, "_ahead", OrderedDict())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        first = decodax.generate(lm, [[3, 1, 4, 3, 1]], max_new_tokens=6, strategy=strategy)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert not any("jit(decode)" in message for message in compiled)  # this thread's: the other has done it
    assert ahead == (["decode"] if strategy is None else ["start", "decode"])
    decodax.generate(lm, [[3, 1, 4, 3, 1]], max_new_tokens=6, strategy=strategy)
    assert len(ahead) <= 2  # a second call prepares nothing
    monkeypatch.setattr("decodax.decoding.generation._MANY_LAYERS", 13)
    programs._programs.clear()
    again = decodax.generate(lm, [[3, 1, 4, 3, 1]], max_new_tokens=6, strategy=strategy)
    np.testing.assert_array_equal(first.tokens[0], again.tokens[0])
    assert first.stats.compile_seconds > 0 and len(ahead) <= 2
