"""Pipeline stages and their schedule equal a simulation and hand calculation."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from decodax.core.weight import Weight
from decodax.sharding.mesh import read_mesh
from decodax.sharding.pipeline import Pipeline, Schedule, Stages, best_micro_batches, find_stages
from decodax.sharding.rules import RULES
from decodax.sharding.stacks import stack_params, stack_weights, unstack_params


def simulate(schedule):
    """Runs the schedule tick by tick: the ticks it takes, and a stage's idle ticks over its busy ones.

    A stage runs one micro-batch at a time, and only after it has been sent: at the end of a tick, from the stage
    before, or from the last stage to the first, which keeps what it cannot start at once.
    """
    stages, chunks, count = schedule.num_stages, schedule.chunks, schedule.micro_batches
    ready = {(0, 0, i) for i in range(count)}  # (chunk, stage, micro-batch)
    done, busy = set(), [0] * stages
    for tick in range(10_000):
        sent = set()
        for stage in range(stages):
            chunk, i, works = schedule.work(tick, stage)
            if not works:
                continue
            job = (int(chunk), stage, int(i))
            assert job in ready, f"{job} has not arrived in tick {tick}"
            ready.remove(job)
            done.add(job)
            busy[stage] += 1
            after = (job[0], stage + 1, job[2]) if stage + 1 < stages else (job[0] + 1, 0, job[2])
            if after[0] < chunks:
                sent.add(after)
        # Stages other than the first must run what they receive at once: they cannot keep it.
        assert all(stage == 0 for _, stage, _ in ready)
        ready |= sent
        if len(done) == stages * chunks * count:
            assert busy == [chunks * count] * stages
            return tick + 1, (tick + 1 - busy[0]) / busy[0]
    raise AssertionError("not all was done")


@pytest.mark.parametrize("sizes", [*itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2, 3, 5, 7, 10))])
def test_a_simulation_takes_the_ticks_and_bubbles_of_the_schedule(sizes):
    schedule = Schedule(*sizes)
    num_stages, chunks, count = sizes
    ticks, pause = simulate(schedule)
    assert ticks == schedule.num_ticks and pause == pytest.approx(schedule.bubble)
    # No schedule is shorter: a micro-batch passes v P chunks, the last stage has m v, and starts P - 1 ticks late.
    assert ticks == max(num_stages * chunks + count - 1, count * chunks + num_stages - 1)
    if count >= num_stages:
        assert pause == pytest.approx((num_stages - 1) / (count * chunks))


def test_stages_are_rounds_of_consecutive_layers():
    """Megatron's figure: with 16 layers, 4 devices and 2 chunks each, device 1 has layers 2, 3 and 10, 11."""
    stages = find_stages("x" * 16, 4, Pipeline(chunks=2))
    assert stages == Stages(4, 2, 2)
    held = [[stages.layers(place)[1 * 2 + chunk] for place in stages.stacks] for chunk in range(2)]
    assert held == [[2, 3], [10, 11]]


@pytest.mark.parametrize("stages", [Stages(3, 2, 2, before=1, after=2), Stages(5, 1, 1), Stages(1, 3, 2, after=1)])
def test_every_layer_has_one_place(stages):
    total = stages.before + stages.after + stages.num_stages * stages.chunks * stages.chunk_layers
    layers = [layer for place in range(stages.num_places) for layer in stages.layers(place)]
    assert sorted(layers) == list(range(total))


def test_first_layers_of_another_kind_are_outside_the_stages():
    assert find_stages("dd" + "m" * 8, 4, Pipeline()) == Stages(4, 1, 2, before=2)
    assert find_stages("lllf" * 4, 2, Pipeline(chunks=2)) == Stages(2, 2, 4)
    assert find_stages("ababab", 2, Pipeline(outside=(0, 2))) == Stages(2, 1, 2, after=2)


@pytest.mark.parametrize(
    ("kinds", "num_stages", "pipeline", "message"),
    [
        ("mmmmm", 4, Pipeline(), r"5 layers do not divide into 4 pipeline stages of 1 chunk.*outside=\(1, 0\)\) would"),
        ("dddmmmmmmm", 4, Pipeline(), r"10 layers do not divide.*outside=\(6, 0\)\) would do, with the 6 layer"),
        ("dmmmmmm", 4, Pipeline(), r"6 layers \(of 7, 1 before and 0 after the stages\) do not.*outside=\(3, 0\)"),
        ("ababab", 2, Pipeline(), r"layers 0 and 3 would be at the same place.*kind \('a' and 'b'\).*\(2, 0\)"),
        ("mmmmmm", 3, Pipeline(chunks=4), r"6 layers do not divide into 3 pipeline stages of 4 chunk.*chunks=1"),
        ("abca", 2, Pipeline(), r"layers 0 and 2 would be .* use another size of the mesh axis"),
    ],
)
def test_layers_that_make_no_stages_are_named_with_what_would_work(kinds, num_stages, pipeline, message):
    with pytest.raises(ValueError, match=message):
        find_stages(kinds, num_stages, pipeline)


def test_the_field_in_which_layers_differ_is_named():
    wide, narrow = Pipeline(micro_batches=4), Pipeline(micro_batches=2)  # any dataclass does
    with pytest.raises(ValueError, match=r"layers 1 and 3 .* differ in micro_batches \(4 and 2\)"):
        find_stages([narrow, wide, narrow, narrow], 2, Pipeline(outside=(0, 0)))


def test_bad_options():
    with pytest.raises(ValueError, match="chunks must be a whole number, at least 1, got 0"):
        Pipeline(chunks=0)
    with pytest.raises(ValueError, match="micro_batches must be a whole number, at least 1, got 0"):
        Pipeline(micro_batches=0)
    with pytest.raises(ValueError, match="outside must be two numbers"):
        Pipeline(outside=(-1, 0))


def test_micro_batches_take_the_least_time_of_all_divisors():
    """A tick reads a chunk's weights, which takes 1, and computes tokens / m tokens, 256 of which take as long."""
    for rows, tokens, stages, chunks in [(12, 12, 4, 1), (12, 6144, 4, 1), (12, 6144, 4, 3), (7, 3584, 2, 1)]:
        chosen = best_micro_batches(rows, tokens, stages, chunks)
        ticks = {m: simulate(Schedule(stages, chunks, m))[0] for m in range(1, rows + 1) if rows % m == 0}
        cost = {m: ticks[m] * (1 + tokens / (256 * m)) for m in ticks}
        assert cost[chosen] == min(cost.values()), (rows, tokens)
    assert best_micro_batches(16, 16, 4, 1) == 1  # a decoding step reads each weight once
    assert best_micro_batches(16, 16 * 512, 4, 1) == 8  # near the root of 3 * 32


def test_parameters_are_stacked_by_place_and_unstacked():
    stages = Stages(2, 2, 1, before=1)
    params = {f"blocks_{layer}": {"mixer": {"out": np.full((3, 2), layer)}} for layer in range(5)}
    params["final_norm"] = {"scale": np.ones(2)}
    stacked = stack_params(params, stages)
    assert set(stacked) == {"blocks_0", "blocks_1", "final_norm"}
    # Both layers of the first stage, then both of the second.
    assert stacked["blocks_1"]["mixer"]["out"][:, 0, 0].tolist() == [1, 3, 2, 4]
    back = unstack_params(stacked, stages)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))
    weights = {name: {"mixer": {"out": Weight(("D", "NH"), (3, 2))}} for name in params if name != "final_norm"}
    described = stack_weights(weights, stages)
    assert described["blocks_0"]["mixer"]["out"] == Weight(("D", "NH"), (3, 2))
    assert described["blocks_1"]["mixer"]["out"] == Weight(("L", "D", "NH"), (4, 3, 2))


def test_a_stage_holds_only_its_own_layers_of_replicated_weights():
    mesh = read_mesh("pipeline=2,expert=2,tensor=2")
    router = Weight(("L", "E", "D"), (4, 6, 3), replicated=True)
    assert RULES.sharding(mesh, router, "router").spec == PartitionSpec("pipeline", None, None)
