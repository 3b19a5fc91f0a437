"""Attention in kernels is attention in plain JAX: steps, chunks, trees, staged tokens, over devices, in gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.kernels_pallas.selection import compiled_for
from decodax.layers.attention import attend_kernels
from decodax.layers.attention.attend import attend
from decodax.layers.attention.attend_kernels import select_attention
from decodax.layers.attention.attend_xla import attend_in_xla, is_for_cpu
from decodax.layers.attention.mask import Ancestors, Causal, Window
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.staged import Staged

BATCH, HEADS, KV_HEADS, SIZE, CAPACITY = 3, 4, 2, 128, 256
LENGTHS = np.array([0, 130, 256], np.int32)
INTERPRETED = ["tpu_interpreted", "gpu_interpreted"]
# float32 sums of at most 350 weighted values of size about 1, after an exponential by the power of two.
TOLERANCE = 1e-5

CASES = {  # new tokens, staged tokens, mask, soft-cap
    "one token": (1, 0, Causal(), None),
    "chain": (5, 0, Causal() & Window(100), 2.0),
    "tree": (5, 0, Ancestors.from_parents(jnp.array([[-1, 0, 0, 2, 1]])) & Causal(), None),
    "staged": (2, 3, Causal() & Ancestors(jnp.array([[[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]], bool)), None),
    "chunk": (70, 0, Causal(), 2.0),
    "chunk with a window": (70, 0, Causal() & Window(90), None),
}


def operands(num_new: int, num_staged: int, *, heads: int = HEADS, kv_heads: int = KV_HEADS):
    random = np.random.default_rng(num_new)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    query = draw(BATCH, num_new, heads, SIZE)
    key, value = (draw(BATCH, kv_heads, num_new, SIZE) for _ in "kv")
    empty = np.arange(CAPACITY)[None, None, :, None] >= LENGTHS[:, None, None, None]
    cached = [jnp.asarray(np.where(empty, np.float32(np.nan), draw(BATCH, kv_heads, CAPACITY, SIZE))) for _ in "kv"]
    cache = KVCache(*cached, jnp.asarray(LENGTHS))
    position = jnp.asarray(LENGTHS[:, None] + num_staged + np.arange(num_new, dtype=np.int32))
    if num_staged:
        rows = KVUpdate(*(jnp.asarray(draw(BATCH, kv_heads, num_staged, SIZE)) for _ in "kv"))
        staged_position = jnp.asarray(LENGTHS[:, None] + np.arange(num_staged, dtype=np.int32))
        cache = Staged(cache, rows, staged_position)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), position, cache


def run(attention, arrays, mask, cache, **options):
    """The attention output, compiled as a whole."""
    return jax.jit(lambda *arrays: attention(*arrays, mask, cache, **options)[0])(*arrays)


def zeroed(cache: KVCache | Staged) -> KVCache | Staged:
    """Plain JAX multiplies slots that hold nothing by zero, so they may not be NaN there."""
    if isinstance(cache, Staged):
        return dataclasses.replace(cache, cache=zeroed(cache.cache))
    key, value = (jnp.nan_to_num(buffer) for buffer in (cache.key, cache.value))
    return dataclasses.replace(cache, key=key, value=value)


@pytest.mark.parametrize("implementation", INTERPRETED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_cases(3)
def test_equals_plain_jax(name, implementation):
    num_new, num_staged, mask, softcap = CASES[name]
    *arrays, cache = operands(num_new, num_staged)
    options = {"scale": SIZE**-0.5, "softcap": softcap}
    got = run(attend, arrays, mask, cache, execution=Execution(implementation), **options)
    want = run(attend_in_xla, arrays, mask, zeroed(cache), **options)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_few_tokens_without_a_cache(implementation):
    """As when logits of a short text are asked for."""
    *arrays, _ = operands(5, 0)
    mask, options = Causal() & Window(3), {"scale": 0.1, "softcap": None}
    got = run(attend, arrays, mask, None, execution=Execution(implementation), **options)
    np.testing.assert_allclose(got, run(attend_in_xla, arrays, mask, None, **options), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["chain", "chunk with a window"])
@pytest.mark.quick_cases(1)
def test_every_device_runs_its_heads(name):
    num_new, _, mask, softcap = CASES[name]
    *arrays, cache = operands(num_new, 0)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    one, two = (
        run(attend, arrays, mask, cache, scale=0.1, softcap=softcap, execution=Execution("tpu_interpreted", devices))
        for devices in (None, mesh)
    )
    assert len(two.sharding.device_set) == 2
    np.testing.assert_array_equal(one, two)


def test_gradients_are_those_of_plain_jax():
    num_new, _, mask, _ = CASES["chain"]
    *arrays, position, cache = operands(num_new, 0)
    cache = zeroed(cache)
    options = {"scale": 0.1, "softcap": None}

    def loss(attention, *arrays):
        return jnp.sum(jnp.sin(attention(*arrays, position, mask, cache, **options)))

    in_kernels = lambda *operands, **options: attend(*operands, **options, execution=Execution("tpu_interpreted"))[0]
    in_xla = lambda *operands, **options: attend_in_xla(*operands, **options)[0]
    gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    got, want = (gradients(attention, *arrays) for attention in (in_kernels, in_xla))
    for gradient, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=TOLERANCE * np.abs(expected).max())


def test_broken_new_tokens_reach_only_their_readers():
    query, key, value, position, cache = operands(5, 0)
    mask = CASES["tree"][2]  # node 1 has no readers but itself and node 4
    nonfinite = value.at[:, :, 1].set(jnp.nan)
    execution = Execution("tpu_interpreted")
    sound, got = (
        run(attend, (query, key, values, position), mask, cache, scale=0.1, softcap=None, execution=execution)
        for values in (value, nonfinite)
    )
    assert np.isnan(got[:, [1, 4]]).all()
    np.testing.assert_array_equal(got[:, [0, 2, 3]], sound[:, [0, 2, 3]])


def chosen(num_new: int, mask, execution: Execution, **changes):
    query, key, value, _, cache = operands(num_new, 0)
    cache = changes.get("cache", lambda cache: cache)(cache)
    return select_attention(query, key, value, mask, cache, execution)


def staged(cache: KVCache) -> Staged:
    return Staged(cache, KVUpdate(cache.key[:, :, :2], cache.value[:, :, :2]), jnp.zeros((BATCH, 2), jnp.int32))


def test_this_device_has_no_kernels():
    choice = chosen(1, Causal(), Execution())
    assert (choice.backend, choice.reason) == ("xla", "there are no kernels for cpu")


@pytest.mark.parametrize(
    ("num_new", "mask", "change", "words"),
    [
        (5, Ancestors(jnp.ones((1, 5, 5), bool)), lambda cache: None, "no chain with a window"),
        (1, Causal(), lambda cache: dataclasses.replace(cache, kept=jnp.ones((3, 2, CAPACITY), bool)), "marks tokens"),
        (1, Causal(), lambda cache: dataclasses.replace(cache, key=cache.key.astype(jnp.bfloat16)), "holds bfloat16"),
        (70, Causal() & Ancestors(jnp.ones((1, 70, 70), bool)), lambda cache: cache, "no chain with a window"),
        (70, Causal(), staged, "staged tokens need a cache before them"),
    ],
)
def test_what_no_kernel_takes_is_said(num_new, mask, change, words):
    with pytest.raises(NotImplementedError, match=words):
        chosen(num_new, mask, Execution("tpu"), cache=change)
    assert chosen(num_new, mask, Execution("xla"), cache=change).backend == "xla"


def test_staged_tokens_count_as_new_ones(monkeypatch):
    """A kernel is asked with as many new tokens as it will get: the staged ones before those of this forward."""
    asked = []
    real = attend_kernels.select_flash_decode

    def recorded(query, key, value, new, **options):
        asked.append((query.shape, new.key.shape, new.value.shape, new.allowed.shape))
        return real(query, key, value, new, **options)

    monkeypatch.setattr(attend_kernels, "select_flash_decode", recorded)
    assert chosen(3, Causal(), Execution("tpu"), cache=staged).backend == "tpu"
    query, key, *_ = operands(3, 0)
    own = (BATCH, key.shape[1], 3 + 2, key.shape[3])
    assert asked == [(query.shape, own, own, (BATCH, 3, 3 + 2))]


def test_heads_that_do_not_divide_over_the_devices():
    mesh = jax.make_mesh((4,), ("tensor",), devices=jax.devices()[:4])
    with pytest.raises(NotImplementedError, match="4 heads for 2 of keys and values do not divide over 4 devices"):
        chosen(1, Causal(), Execution("tpu", mesh))


def test_a_program_takes_the_kernels_of_the_device_that_it_is_compiled_for():
    """Of a device that need not be here; what the shapes are too narrow for runs in plain JAX, in that device's way."""
    assert Execution().runs_xla and is_for_cpu(Execution())
    with compiled_for("tpu"):
        assert not Execution().runs_xla and not is_for_cpu(Execution()) and Execution("xla").runs_xla
        assert chosen(1, Causal(), Execution()).backend == "tpu"
        assert chosen(70, Causal(), Execution()).backend == "tpu"
        narrow = lambda cache: dataclasses.replace(cache, key=cache.key[..., :64], value=cache.value[..., :64])
        query, key, value, _, cache = operands(1, 0)
        choice = select_attention(query[..., :64], key[..., :64], value[..., :64], Causal(), narrow(cache), Execution())
        assert "XLA would copy caches of head size 64" in choice.reason
        no_chain = chosen(70, Ancestors(jnp.ones((1, 70, 70), bool)), Execution())
        reason = "the program is for a TPU, but its mask (Ancestors) is no chain with a window"
        assert (no_chain.backend, no_chain.reason) == ("xla", reason)
    with compiled_for("cpu"):
        assert Execution().runs_xla and is_for_cpu(Execution())
    assert Execution().runs_xla and is_for_cpu(Execution())
