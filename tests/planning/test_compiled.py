"""Plans compiled for absent TPUs have the bytes and collectives that the planner predicts."""

import time
from collections import Counter

import jax
import pytest

from decodax.planning.compiled import cannot_compile, compile_prompt, compile_step
from decodax.planning.memory import Workload
from decodax.planning.search import DoesNotFitError, best_plans, plan_for
from decodax.planning.topology import parse_topology
from tests.planning.published import config_of

WORKLOAD = Workload(8, 2048)


@pytest.fixture
def as_users_compile():
    """Without the session's exact float32 products, as no float32 is multiplied here."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    with jax.default_matmul_precision("default"):
        yield


def check_bytes(plan, program):
    """The planner's bytes per chip against the compiler's bytes of the program's arguments."""
    own = plan.memory.weights + plan.memory.cache
    assert own == program.weight_bytes + program.state_bytes
    assert program.argument_bytes == pytest.approx(own, rel=0.02)
    assert program.total_bytes < plan.memory.usable


def check_collectives(plan, program):
    """As many collectives of each kind and size as the cost model counts."""
    predicted = Counter()
    for one in plan.token.collectives:
        predicted[one.kind] += one.count
    compiled = Counter()
    for one, count in program.collectives:
        compiled[one.kind] += count
    assert compiled == predicted
    # XLA combines small ones that are ready at the same time.
    predicted_bytes = sum(one.num_bytes for one in plan.token.collectives)
    assert sum(one.num_bytes * count for one, count in program.collectives) == pytest.approx(predicted_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("name", "num_layers", "sizes"),
    [
        ("Llama-3.1-8B", 2, {"tensor": 8}),
        pytest.param("Llama-3.1-8B", 2, {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param("DeepSeek-V3", 4, {"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("DeepSeek-V3", 4, {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_of_few_layers(name, num_layers, sizes, as_users_compile):
    config = config_of(name, num_hidden_layers=num_layers)
    topology = "v5e:2x4" if name.startswith("Llama") else "v5p:2x2x2"
    plan = plan_for(config, parse_topology(topology), WORKLOAD, sizes)
    program = compile_step(plan)
    check_bytes(plan, program)
    check_collectives(plan, program)
    assert program.num_layers == program.of_layers == num_layers and program.temporary_bytes < program.state_bytes


def test_a_step_of_a_pipeline(as_users_compile):
    """Four layers in two stages; the program holds the body of the loop over micro-batches once."""
    config = config_of("Llama-3.1-8B", num_hidden_layers=4)
    plan = plan_for(config, parse_topology("v5e:2x4"), WORKLOAD, {"pipeline": 2, "tensor": 4})
    program = compile_step(plan)
    check_bytes(plan, program)
    assert sum(count for one, count in program.collectives if one.kind == "collective-permute") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "sizes", "workload"),
    [
        ("Llama-3.1-8B", "v5e:2x4", {"tensor": 8}, Workload(64, 8192)),
        ("DeepSeek-V3", "v5p:2x2x2", {"expert": 4, "tensor": 2}, WORKLOAD),
    ],
    ids=["dense", "experts"],
)
def test_temporaries_of_large_chunks_are_as_estimated(name, topology, sizes, workload, as_users_compile):
    plan = plan_for(config_of(name, num_hidden_layers=4), parse_topology(topology), workload, sizes)
    assert 0.8 < compile_prompt(plan).temporary_bytes / plan.memory.temporaries <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"tensor": 8}], ids=str)
def test_a_prompt(sizes, as_users_compile):
    """Two of 32 layers are compiled, of which the last makes keys and values only; all-reduces are counted for 32."""
    config = config_of("Llama-3.1-8B")
    plan = plan_for(config, parse_topology("v5e:2x4"), WORKLOAD, sizes)
    program = compile_prompt(plan)
    assert (program.num_layers, program.of_layers) == (2, 32)
    assert program.temporary_bytes < plan.memory.temporaries
    large = Counter({one.kind: 0 for one, _ in program.collectives})
    tokens = 8 * 512 // sizes.get("data", 1)
    for one, count in program.collectives:
        if one.num_bytes == 2 * tokens * 4096:
            large[one.kind] += count
    assert large["all-reduce"] == 1 + 2 * 31  # the embedding's, and those of all layers but the last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("Llama-3.1-8B", "v5e:2x4"),
        ("Llama-3.1-70B", "v5e:4x4"),
        ("Llama-3.1-70B", "v6e:4x4"),
        ("DeepSeek-V3", "v5p:4x4x8"),
    ],
)
def test_a_step_of_the_best_plan(name, topology, as_users_compile):
    """Complete models, for absent pods. Each takes a minute or a few; the time is printed, not asserted."""
    plan = best_plans(config_of(name), parse_topology(topology), WORKLOAD)[0]
    begin = time.monotonic()
    program = compile_step(plan)
    print(f"{name} for {topology}, {plan.split.text}: compiled in {time.monotonic() - begin:.0f} s")
    check_bytes(plan, program)
    assert program.num_layers == program.of_layers == plan.split.config.num_layers
    if name.startswith("Llama"):
        check_collectives(plan, program)


def test_a_plan_beyond_the_compiler_s_memory_is_reported(as_users_compile):
    """A cache as large as a chip's memory, which the planner's memory model rejects as well."""
    config = config_of("Llama-3.1-8B", num_hidden_layers=1)
    plan = plan_for(config, parse_topology("v5e:1x1"), Workload(8, 524288), {"data": 1})
    assert plan.memory.free < 0
    with pytest.raises(DoesNotFitError, match="the compiler finds no room for the decoding step"):
        compile_step(plan)


@pytest.mark.parametrize(
    ("topology", "sizes", "stored", "reason"),
    [
        ("gpu:h200x8", {"tensor": 8}, "same", "nothing here compiles for GPUs"),
        ("v5e:2x4", {"tensor": 8}, "int8", "int8 is in the cost model alone"),
        ("v5e:2x4", {"tensor": 4, "pipeline": 2}, "same", None),
        ("v5e:2x4", {"tensor": 8}, "same", None),
    ],
)
def test_plans_that_are_not_compiled_give_the_reason(topology, sizes, stored, reason):
    config = config_of("Llama-3.1-8B", num_hidden_layers=2)
    plan = plan_for(config, parse_topology(topology), Workload(8, 2048, weights=stored), sizes)
    said = cannot_compile(plan)
    assert said is None if reason is None else said is not None and reason in said
