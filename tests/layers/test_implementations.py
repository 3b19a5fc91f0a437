"""Attention picks the first implementation of its table that supports the operands, in few calls."""

import traceback

import jax
import jax.numpy as jnp
import pytest

from decodax.layers.attention import attend, attend_absorbed, attend_expanded
from decodax.layers.attention.implementations import (
    AttentionImplementation,
    always_supported,
    attention_by,
    select_implementation,
)
from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.full import KVCache

TABLES = {
    module.__name__.rpartition(".")[2]: module.IMPLEMENTATIONS for module in (attend, attend_absorbed, attend_expanded)
}


@pytest.mark.parametrize("name", TABLES)
def test_plain_jax_comes_last_and_supports_everything(name):
    *others, last = TABLES[name]
    assert last == "xla" and others[-1] == "kernel"
    assert TABLES[name]["xla"].unsupported_reason is always_supported


def test_the_first_that_supports_the_operands_runs():
    def entry(name, reason):
        return AttentionImplementation(lambda *_: reason, lambda *_, **options: (name, options))

    table = {"first": entry("first", "no"), "xla": entry("xla", None)}
    assert attention_by(table, (1, 2), ON_THIS_DEVICE, scale=3)(1, 2) == (
        "xla", {"execution": ON_THIS_DEVICE, "scale": 3}
    )  # fmt: skip

    def refuses(*_):
        raise NotImplementedError("asked for")

    with pytest.raises(NotImplementedError, match="asked for"):
        attention_by({"kernel": AttentionImplementation(refuses, refuses), **table}, (1,), ON_THIS_DEVICE)


def test_what_needs_a_mesh_is_asked_only_with_one():
    asked = []

    def reason(*operands):
        asked.append(operands)

    plain = AttentionImplementation(always_supported, always_supported)
    table = {"split": AttentionImplementation(reason, reason, needs_mesh=True), "xla": plain}
    assert select_implementation(table, (1,), ON_THIS_DEVICE) == "xla" and not asked
    on_mesh = Execution(mesh=jax.make_mesh((2,), ("tensor",)))
    assert select_implementation(table, (1,), on_mesh) == "split" and asked == [(1, on_mesh)]


def test_three_calls_from_attend_to_the_first_product(monkeypatch):
    calls, einsum = [], jnp.einsum

    def recorded(*operands, **options):
        frames = [frame.name for frame in traceback.extract_stack() if "/decodax/" in frame.filename]
        calls.append([name for name in frames if not name.startswith("<")])  # Python 3.11 calls comprehensions
        return einsum(*operands, **options)

    monkeypatch.setattr(jnp, "einsum", recorded)
    query, key = jnp.ones((2, 1, 6, 7)), jnp.ones((2, 3, 1, 7))
    cache = KVCache.empty(2, 3, 11, 7, jnp.float32)
    attend.attend(query, key, key, jnp.zeros((2, 1), jnp.int32), Causal(), cache, scale=1.0, softcap=None)
    assert calls[0] == ["attend", "attend_in_xla", "_attend_to_new", "attend_to_block"]
