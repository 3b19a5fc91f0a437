"""The search for a plan: the meshes considered, the mesh chosen, and the error where nothing fits."""

import math
import re

import pytest

from decodax.planning.cost import cost
from decodax.planning.memory import Workload, memory_of
from decodax.planning.parts import forward_parts
from decodax.planning.search import (
    OBJECTIVES,
    DoesNotFitError,
    best_plans,
    degrees,
    micro_batches,
    plan_for,
    search,
)
from decodax.planning.split import Split
from decodax.planning.topology import parse_topology
from decodax.sharding.rules import MESH_AXES
from tests.planning.published import config_of

V5E_8, V5E_16 = parse_topology("v5e:2x4"), parse_topology("v5e:4x4")
LLAMA = config_of("Llama-3.1-8B")


def test_every_division_of_the_chips():
    found = [tuple(sizes.values()) for sizes in degrees(LLAMA, 8, 8)]
    assert len(set(found)) == len(found) and {math.prod(sizes) for sizes in found} == {8}
    assert all(tuple(sizes) == MESH_AXES for sizes in degrees(LLAMA, 8, 8))
    assert len(found) == 20  # 8 = 2 x 2 x 2 over four axes: no experts, so none over expert
    experts = list(degrees(config_of("DeepSeek-V3"), 8, 8))
    assert max(sizes["expert"] for sizes in experts) == 8
    assert {sizes["pipeline"] for sizes in experts} == {1, 2}  # 58 of 61 layers are alike: 3 are outside


def test_rows_have_to_divide():
    for sizes in degrees(LLAMA, 8, 6):
        assert 6 % sizes["data"] == 0
    assert {sizes["data"] for sizes in degrees(LLAMA, 8, 6)} == {1, 2}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_comes_first(objective):
    plans = best_plans(LLAMA, parse_topology("v5e:2x2"), Workload(8, 2048), objective)
    values = {
        "time-per-token": [plan.seconds_per_token for plan in plans],
        "time-to-first-token": [plan.seconds_to_first_token for plan in plans],
        "throughput": [-plan.tokens_per_second for plan in plans],
        "fit": [-plan.memory.free for plan in plans],
    }[objective]
    assert values == sorted(values)
    assert all(plan.memory.free >= 0 for plan in plans)


def test_one_row_is_decoded_by_tensor_and_many_by_data():
    """All chips read the weights of one row together, and of many rows until all-reduces take longer than weights."""
    one = best_plans(LLAMA, V5E_8, Workload(1, 2048))[0]
    many = best_plans(LLAMA, parse_topology("v6e:2x4"), Workload(512, 256), "throughput")[0]
    assert one.split.text == "tensor=8" and many.split.degree("tensor") == 4


def test_a_requested_mesh():
    (plan,) = best_plans(LLAMA, V5E_8, Workload(8, 2048), mesh="tensor=4,data=2")
    assert plan.split.text == "tensor=4,data=2"
    with pytest.raises(ValueError, match=r"the mesh 'tensor=4' needs 4 chips, and v5e:2x4 has 8"):
        best_plans(LLAMA, V5E_8, Workload(8, 2048), mesh="tensor=4")
    with pytest.raises(ValueError, match=r"a batch of 3 does not divide over data=8: use a multiple of 8 rows"):
        best_plans(LLAMA, V5E_8, Workload(3, 2048), mesh="data=8")
    with pytest.raises(ValueError, match="a mesh has axes data, pipeline, context, expert, tensor"):
        best_plans(LLAMA, V5E_8, Workload(8, 2048), mesh="tensors=8")
    padded = best_plans(config_of("Llama-3.1-8B", vocab_size=128259), V5E_8, Workload(8, 2048), mesh="tensor=8")[0]
    even = best_plans(config_of("Llama-3.1-8B", vocab_size=128264), V5E_8, Workload(8, 2048), mesh="tensor=8")[0]
    assert padded.memory.weights == even.memory.weights > 0


def test_meshes_that_are_left_out_give_the_reason():
    """Nine query heads on eight chips: seven meshes divide the model, as 30 layers make two stages."""
    config = config_of("Llama-3.1-8B", num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30, head_dim=128)
    found = search(config, V5E_8, Workload(8, 2048))
    assert len(found.plans) == 7 and all("tensor" not in plan.split.text for plan in found.plans)
    reasons = {one.mesh: one.reason for one in found.left_out}
    assert not {plan.split.text for plan in found.plans} & set(reasons) and len(reasons) + 7 == math.comb(7, 4)
    assert (
        "its axis N of 9 query heads does not divide over the 2 devices of mesh axis tensor"
        in reasons["tensor=2,data=4"]
    )
    assert "30 layers do not divide into 8 pipeline stages" in reasons["pipeline=8"]
    assert "no experts" in reasons["expert=8"]
    with pytest.raises(ValueError, match=r"'tensor=2,data=4' does not divide this model: .*query") as error:
        search(config, V5E_8, Workload(8, 2048), mesh="tensor=2,data=4")
    listed = str(error.value).partition("that would do: ")[2].split("; ")
    assert sorted(listed) == sorted(plan.split.text for plan in found.plans)
    three = search(config, V5E_8, Workload(3, 2048)).left_out
    assert any(one.reason == "a batch of 3 does not divide over data=8" for one in three)


def test_a_context_beyond_the_model_s_is_refused():
    with pytest.raises(ValueError, match=r"context must be at most the model's 8,192 tokens, got 8,193"):
        best_plans(config_of("Llama-3.1-8B", max_position_embeddings=8192), V5E_8, Workload(8, 8193))


@pytest.mark.slow
def test_the_error_for_a_model_that_does_not_fit_gives_the_excess_and_a_larger_slice():
    workload = Workload(8, 2048)
    expected = r"does not fit on v5e:2x2.* too few\. The smallest that would do is"
    with pytest.raises(DoesNotFitError, match=expected) as error:
        best_plans(config_of("Llama-3.1-70B"), parse_topology("v5e:2x2"), workload)
    text = str(error.value)
    assert text.endswith("v5e:4x4")  # 141 GB over 8 chips are more than 16 each
    needed, had, missing = (float(re.search(pattern, text)[1]) for pattern in (
        r"a chip needs ([\d.]+) GiB", r"and has ([\d.]+) GiB", r": ([\d.]+) GiB too few",
    ))  # fmt: skip
    assert missing == pytest.approx(needed - had, abs=0.011) and had == 15.75
    found = search(config_of("Llama-3.1-70B"), V5E_16, workload)
    assert any(one.reason.startswith("does not fit: a chip has") for one in found.left_out)
    fits = found.plans
    assert fits and fits[0].memory.free >= 0
    with pytest.raises(DoesNotFitError, match="no larger slice of NVIDIA H100 SXM would do"):
        best_plans(config_of("DeepSeek-V3"), parse_topology("gpu:h100x8"), workload)


def test_memory_of_a_pipeline_is_that_of_a_stage():
    whole = memory_of(Split.of(LLAMA, {"tensor": 2}), V5E_8, Workload(8, 2048))
    stage = memory_of(Split.of(LLAMA, {"tensor": 2, "pipeline": 4}), V5E_8, Workload(8, 2048))
    embedding_and_head = 2 * 2 * 128256 * 4096 // 2 + 2 * 4096
    assert stage.weights - embedding_and_head == pytest.approx((whole.weights - embedding_and_head) / 4)
    caches = 2 * 8 * 2048 * 8 * 128 * 2 * 32 // 2
    assert whole.cache - stage.cache == pytest.approx(caches * 3 / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("context", "capacity"),
    # Sizes are 2^n times 4, 5, 6 or 7, and then multiples of 128, as kernels need.
    [(127, 128), (128, 128), (129, 256), (1023, 1024), (1024, 1024), (1025, 1280), (1791, 1792), (1793, 2048)],
)
def test_the_cache_has_room_for_the_whole_context(context, capacity):
    """One token below a size that caches can have, at it, and above it: there the last token needs the next size."""
    workload = Workload(8, context)
    assert workload.capacity == capacity
    caches = 2 * 8 * capacity * 8 * 128 * 2 * 32 // 8  # keys and values in bfloat16, one of 8 heads on each chip
    beside = memory_of(Split.of(LLAMA, {"tensor": 8}), V5E_8, workload).cache - caches
    assert 0 < beside < 8 * (16 * capacity + 4096)  # tokens, logprobs and counts of each row


def test_a_pipeline_fills_and_drains():
    """A step is not split: its stages run in turn. 4 micro-batches of 8 prompts go through 2 stages in 5 half turns.

    Compared with chips of one stage alone, as each half of a data axis, with as many rows.
    """
    piped = plan_for(LLAMA, V5E_8, Workload(8, 2048), {"tensor": 4, "pipeline": 2})
    assert (micro_batches(piped.split, piped.workload, 1), micro_batches(piped.split, piped.workload, 512)) == (1, 4)
    eight, two = (plan_for(LLAMA, V5E_8, Workload(2 * rows, 2048), {"tensor": 4, "data": 2}) for rows in (8, 2))
    assert piped.token_turns == 1
    assert piped.seconds_per_token == pytest.approx(eight.seconds_per_token, rel=0.02)
    assert piped.prompt_seconds == pytest.approx(two.prompt_seconds * 5 / 2, rel=0.02)


def test_a_prompts_time_is_that_of_its_chunks():
    """Sampled chunks of a long prompt give the sum over all of them."""
    workload = Workload(1, 65536)
    plan = plan_for(LLAMA, V5E_8, workload, {"tensor": 8})
    rings = V5E_8.rings({"tensor": 8})
    every = (
        cost(forward_parts(plan.split, workload.tokens(512, start), with_logits=False), V5E_8.chip, rings).total
        for start in range(0, 65536, 512)
    )
    assert plan.prompt_seconds == pytest.approx(sum(every), rel=0.01)


def test_a_workload_has_rows_and_tokens():
    with pytest.raises(ValueError, match="at least 1 row of 2 tokens, got 0 rows of 2048"):
        Workload(0, 2048)
    for rows in (10**6, 10**12, 10**20):
        with pytest.raises(ValueError, match=rf"^batch must be at most 262,144 rows, got {rows:,}$"):
            Workload(rows, 2048)


def test_memory_for_temporaries():
    """A chunk's hidden states, and a feed-forward layer's inner outputs on a chip; or a step's logits."""
    split = Split.of(LLAMA, {"tensor": 8})
    expected = 8 * 512 * (2 * 14336 // 8 + 3 * 4096) * 2
    assert memory_of(split, V5E_8, Workload(8, 2048)).temporaries == expected
    # One row's chunk of two tokens is less than its logits.
    assert memory_of(split, V5E_8, Workload(1, 2)).temporaries == 2 * 128256 // 8 * 4


def test_memory_for_experts_that_exchange_tokens():
    """Every device has room for twice its mean share of choices, sent, received and returned."""
    split = Split.of(config_of("DeepSeek-V3", num_hidden_layers=4), {"expert": 4, "tensor": 2})
    room = 2 * 8 * (8 * 512) // 4
    expected = room * (3 * 7168 + 2 * 2048 // 2) * 2 + 3 * (2 * 512) * 7168 * 2
    assert memory_of(split, parse_topology("v5p:2x2x2"), Workload(8, 2048)).temporaries == expected
