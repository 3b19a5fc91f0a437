"""The cost of a forward equals hand calculation, and XLA's count for a program compiled here."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.model import Model
from decodax.planning.mixture import busiest_experts
from decodax.planning.parts import forward_parts
from decodax.planning.split import Split
from decodax.planning.work import Tokens
from tests.planning.published import config_of


def parts_of(config, sizes, tokens, *, with_logits=True):
    return {part.name: part for part in forward_parts(Split.of(config, sizes), tokens, with_logits=with_logits)}


def total(parts, quantity):
    return sum(part.count * getattr(part, quantity) for part in parts.values())


def test_a_step_of_llama_by_hand():
    """Two operations per weight and token; 4 N H per cached token; weights and cache once."""
    config = config_of("Llama-3.1-70B")
    parts = parts_of(config, {"tensor": 8}, Tokens(8, 1, 2047))
    layers = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672) + 128256 * 8192
    mixing = 80 * 4 * 64 * 128 * 2048
    assert total(parts, "flops") == pytest.approx(8 * (2 * layers + mixing) / 8)
    norms = (2 * 80 + 1) * 8192
    embedded = 8 * 8192  # one embedding row per token, on every chip
    assert total(parts, "weight_bytes") == pytest.approx(2 * (layers / 8 + norms + embedded))
    assert total(parts, "cache_bytes") == pytest.approx(80 * 2 * 2 * 8 * 2047 * 128, rel=1e-4)
    sums = [one for part in parts.values() for one in part.collectives * part.count]
    assert [one.num_bytes for one in sums].count(2 * 8 * 8192) == 161 and len(sums) == 164
    assert {(one.kind, one.axes) for one in sums} == {("all-reduce", ("tensor",))}
    # Over 16 chips the axis is split in two for the key-value heads, and an all-reduce goes over both.
    more = parts_of(config, {"tensor": 16}, Tokens(8, 1, 2047))
    assert {one.axes for part in more.values() for one in part.collectives} == {("tensor",)}


def test_int8_halves_the_bytes_of_layers_and_of_the_cache():
    config = config_of("Llama-3.1-70B")
    plain = parts_of(config, {"tensor": 8}, Tokens(8, 1, 2048))
    int8 = parts_of(config, {"tensor": 8}, Tokens(8, 1, 2048, weights="int8", cache="int8"))
    assert int8["feed-forward"].weight_bytes == pytest.approx(plain["feed-forward"].weight_bytes / 2, rel=2e-3)
    assert int8["attention"].cache_bytes == pytest.approx(plain["attention"].cache_bytes / 2, rel=1e-3)
    assert int8["logits"].weight_bytes == plain["logits"].weight_bytes
    assert int8["attention"].flops == plain["attention"].flops


def test_rows_and_slots_are_sharded():
    config = config_of("Llama-3.1-8B", num_hidden_layers=2)
    whole = parts_of(config, {}, Tokens(8, 1, 4096))
    rows = parts_of(config, {"data": 4}, Tokens(8, 1, 4096))
    slots = parts_of(config, {"context": 4}, Tokens(8, 1, 4096))
    for name, quantity in itertools.product(("attention", "feed-forward"), ("flops", "weight_bytes", "cache_bytes")):
        one = getattr(whole[name], quantity)
        per_row, per_slot = getattr(rows[name], quantity), getattr(slots[name], quantity)
        assert per_row == pytest.approx(one if quantity == "weight_bytes" else one / 4, rel=1e-4)
        if quantity == "cache_bytes":
            assert per_slot == pytest.approx(one / 4, rel=1e-3)
    mixing = 8 * 4 * 32 * 128 * 4097  # each chip attends to a quarter of the slots, after all of the projections
    assert whole["attention"].flops - slots["attention"].flops == pytest.approx(3 / 4 * mixing)
    assert not whole["attention"].collectives and not rows["attention"].collectives
    (merge,) = slots["attention"].collectives
    assert merge.axes == ("context",) and merge.num_bytes == 8 * 32 * (128 + 2) * 4  # whatever is cached


def test_a_window_bounds_what_is_read():
    tokens = Tokens(2, 1, 4096)
    config = config_of("Llama-3.1-8B", num_hidden_layers=1)
    block = config.blocks[0]
    windowed = replace(config, blocks=(block.with_mixer(replace(block.mixer.layer, window=512)),))
    full, less = (parts_of(one, {}, tokens)["attention"] for one in (config, windowed))
    assert less.cache_bytes == pytest.approx(full.cache_bytes / 8, rel=1e-3) and less.flops < full.flops


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (4, 1), (2, 4)])
def test_weights_of_experts_by_hand(tensor, expert):
    """One token of DeepSeek-V3 activates eight of 256 experts, three products of 2048 x 7168 each."""
    config = config_of("DeepSeek-V3", num_hidden_layers=4)
    parts = parts_of(config, {"tensor": tensor, "expert": expert}, Tokens(1, 1, 100))
    one = 2 * 3 * 2048 * 7168 / tensor
    if expert == 1:
        assert parts["experts"].weight_bytes == pytest.approx(8 * one)
    else:
        assert 8 / 4 * one < parts["experts"].weight_bytes < 5 * one  # the busiest of four devices
    everything = parts_of(config, {"tensor": tensor, "expert": expert}, Tokens(64, 512, 0), with_logits=False)
    assert everything["experts"].weight_bytes == pytest.approx(256 / expert * one)


def test_the_busiest_of_many_devices():
    random = np.random.default_rng(0)
    held, devices, chance = 4, 16, 0.22
    drawn = random.random((20000, devices, held)) < chance
    assert busiest_experts(held, devices, chance) == pytest.approx(drawn.sum(axis=2).max(axis=1).mean(), rel=0.02)
    assert busiest_experts(held, 1, chance) == pytest.approx(held * chance)
    assert busiest_experts(held, devices, 1.0) == held


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "DeepSeek-V3"])
def test_flops_as_xla_counts_them(name):
    """Every product of a step, lowered for one device, with sizes a 16th of the real ones."""
    small = {"hidden_size": 256, "intermediate_size": 896, "vocab_size": 8192, "num_hidden_layers": 2}
    if name == "DeepSeek-V3":
        small |= {"num_attention_heads": 2, "first_k_dense_replace": 2, "q_lora_rank": 96, "kv_lora_rank": 64}
    else:
        small |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = config_of(name, **small)
    model, rows, cached = Model(config), 4, 255
    params = jax.tree.map(
        lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.float32),
        config.weights(),
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )
    caches = jax.eval_shape(lambda: model.empty_cache(rows, cached + 1, jnp.float32))
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def step(params, token, position, caches):
        out = model.apply(params, token, position, caches)
        return model.logits(params, out.hidden), out.cache_updates

    counted = jax.jit(step).lower(params, token, token, caches).cost_analysis()
    parts = parts_of(config, {}, Tokens(rows, 1, cached, "float32"))
    products = total(parts, "flops")
    assert products <= counted["flops"] < 1.15 * products  # and it counts norms, rotations, softmax


def test_prompts_cost_what_their_tokens_cost():
    """A chunk of T tokens after S: products T times those of a step, attention in proportion to attended keys."""
    config = config_of("Llama-3.1-8B", num_hidden_layers=1)
    one = parts_of(config, {}, Tokens(2, 1, 1024))["feed-forward"]
    many = parts_of(config, {}, Tokens(2, 512, 1024), with_logits=False)["feed-forward"]
    assert many.flops == 512 * one.flops and many.weight_bytes == one.weight_bytes
    near, far = (
        parts_of(config, {}, Tokens(2, 512, cached), with_logits=False)["attention"].flops for cached in (0, 1024)
    )
    assert far - near == pytest.approx(2 * 512 * 4 * 32 * 128 * 1024)


def test_attention_with_another_projection_costs_what_grouped_queries_cost():
    """Heads that read keys and values of every token, however these are made (MFA, CCA)."""
    rope = Rope(16, 1e4)
    grouped = GQAConfig(8, 2, 32, rope, 0.2).mixing_cost(1, 32_768)
    shared = MFAConfig(8, 32, 16, rope, 0.2, RMSNormConfig(1e-5)).mixing_cost(1, 32_768)
    convolved = CCAConfig(8, 2, 32, rope, 0.2).mixing_cost(1, 32_768)
    assert grouped == shared == convolved
    assert grouped.flops == 4 * 8 * 32 * 32_769
