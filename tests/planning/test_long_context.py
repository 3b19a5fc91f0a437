"""The rows and lengths that fit, by the paper's formula, and by testing that the next larger one does not."""

import dataclasses

import pytest

from decodax.models.configs.hf_config import read_config
from decodax.planning.long_context import room
from decodax.planning.memory import Workload, memory_of
from decodax.planning.search import plan_for
from decodax.planning.topology import parse_topology
from tests.planning.published import FIELDS, config_of

YI_34B = FIELDS["Llama-3.1-8B"] | {
    "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56,
    "vocab_size": 64000,
}  # fmt: skip


def test_the_papers_example():
    """Yi-34B: 2 x 60 layers x 8 heads x 128 x 2 bytes = 245,760 a token, 12.3 GB for 50,000."""
    plan = plan_for(read_config(YI_34B)[1], parse_topology("gpu:a100x2"), Workload(1, 49_152), {"tensor": 2})
    found = room(plan)
    per_token = 2 * 60 * 8 * 128 * 2
    assert 2 * found.cached_token_bytes == pytest.approx(per_token, rel=1e-3)
    assert per_token * 50_000 == pytest.approx(12.3e9, rel=1e-3)
    assert 2 * plan.memory.cache == pytest.approx(per_token * 49_152, rel=1e-3)
    free = plan.memory.usable - plan.memory.weights
    assert found.most_rows == pytest.approx(free / plan.memory.cache, abs=1.5)
    assert found.switch_seconds == pytest.approx(plan.memory.cache / 32e9, rel=1e-3)
    once, twice = (found.session_seconds(plan, turns, 100) for turns in (1, 2))
    assert twice - once == pytest.approx(100 * plan.seconds_per_token + 2 * found.switch_seconds)


@pytest.mark.parametrize(("sizes", "step"), [({"tensor": 8}, 1), ({"tensor": 4, "data": 2}, 2)])
@pytest.mark.quick_cases(1)
def test_one_more_does_not_fit(sizes, step):
    plan = plan_for(config_of("Llama-3.1-8B"), parse_topology("v5e:2x4"), Workload(8, 2048), sizes)
    found = room(plan)

    def free(**changed):
        return memory_of(plan.split, plan.topology, dataclasses.replace(plan.workload, **changed)).free

    assert free(batch=found.most_rows) >= 0 > free(batch=found.most_rows + step)
    assert free(context=found.most_tokens) >= 0 > free(context=found.most_tokens + 128)
    assert not found.is_whole_context


def test_no_more_tokens_than_the_models_context():
    config = config_of("Llama-3.1-8B", max_position_embeddings=8100)  # memory would allow more
    found = room(plan_for(config, parse_topology("v5e:2x4"), Workload(8, 2048), {"tensor": 8}))
    assert found.most_tokens == 8100 and found.is_whole_context
