"""Latent attention in kernels is latent attention in plain JAX: steps, trees, chunks, over devices, in gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.layers.attention import expanded_kernels
from decodax.layers.attention.attend_absorbed import select_absorbed
from decodax.layers.attention.expanded_over_devices import _cached as read_slots
from decodax.layers.attention.mask import Ancestors, Causal, Tokens, Window
from decodax.layers.attention.over_context import OwnSlots
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model, commit
from decodax.sharding.rules import TENSOR
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh

HEADS, RANK, ROPE, WIDTH, CAPACITY = 2, 128, 16, 24, 256
LENGTHS = np.array([0, 200], np.int32)
NORM = RMSNormConfig(1e-6)
MIXER = MLAConfig(HEADS, 16, 32, RANK, None, Rope(ROPE, 1e4, interleaved=True), 0.2, NORM)
# float32 sums over 128 numbers of a latent and at most 270 tokens, after an exponential by the power of two.
TOLERANCE = 2e-5

TREE = Ancestors.from_parents(jnp.array([[-1, 0, 0, 2, 1]])) & Causal()
CASES = {  # new tokens, staged tokens, mask
    "long draft": (18, 0, Causal()),
    "tree": (5, 0, TREE),
    "staged": (2, 3, Causal() & Ancestors(jnp.array([[[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]], bool))),
    "chunk": (40, 0, Causal()),
    "chunk with a window": (40, 0, Causal() & Window(90)),
}


def operands(num_new: int, num_staged: int = 0):
    random = np.random.default_rng(num_new)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    batch = len(LENGTHS)
    cache = LatentCache(draw(batch, CAPACITY, RANK), draw(batch, CAPACITY, ROPE), jnp.asarray(LENGTHS))
    position = jnp.asarray(LENGTHS[:, None] + num_staged + np.arange(num_new, dtype=np.int32))
    if num_staged:
        rows = LatentUpdate(draw(batch, num_staged, RANK), draw(batch, num_staged, ROPE))
        cache = Staged(cache, rows, jnp.asarray(LENGTHS[:, None] + np.arange(num_staged, dtype=np.int32)))
    return draw(batch, num_new, WIDTH), position, cache


@partial(jax.jit, static_argnums=0)
def run(execution, params, hidden, position, cache, mask):
    module = MIXER.module(WIDTH, "mixer", execution)
    return module.apply({"params": params}, hidden, position, position + 1, cache, mask)[0]


def parameters(dtype=jnp.float32):
    random = np.random.default_rng(0)
    draw = lambda weight: jnp.asarray(random.standard_normal(weight.shape) * weight.shape[-1] ** -0.5, dtype)
    return jax.tree.map(draw, MIXER.weights(WIDTH), is_leaf=lambda leaf: isinstance(leaf, Weight))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A chunk of 40 tokens reads keys and values, not latents, and a cache in two blocks."""
    monkeypatch.setattr(MLAConfig, "most_absorbed_tokens", 20)
    monkeypatch.setattr(expanded_kernels, "KERNEL_BLOCK_TOKENS", (128,))


def check_equals_plain_jax(name, execution):
    num_new, num_staged, mask = CASES[name]
    hidden, position, cache = operands(num_new, num_staged)
    got, want = (run(kind, parameters(), hidden, position, cache, mask) for kind in (execution, Execution("xla")))
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())
    return got


def test_more_queries_than_a_kernel_takes_at_once():
    check_equals_plain_jax("long draft", Execution("tpu_interpreted"))


@pytest.mark.parametrize("name", ["staged", "chunk with a window"])
@pytest.mark.quick_cases(1)
def test_gpu_kernels_equal_plain_jax(name):
    check_equals_plain_jax(name, Execution("gpu_interpreted"))


@pytest.mark.parametrize("name", ["tree", "chunk"])
@pytest.mark.quick_cases(1)
def test_every_device_runs_its_heads(name):
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    got = check_equals_plain_jax(name, Execution("tpu_interpreted", mesh))
    assert len(got.sharding.device_set) == 2


@pytest.mark.parametrize("name", ["tree", "chunk"])
def test_broken_tokens_reach_only_their_readers(name):
    num_new, _, mask = CASES[name]
    hidden, position, cache = operands(num_new)
    nonfinite, tokens = hidden.at[:, 1].set(jnp.nan), Tokens(position, is_new=True)
    readers = np.array(mask.allows(tokens, tokens))[0, :, 1]
    execution = Execution("tpu_interpreted")
    sound, got = (run(execution, parameters(), inputs, position, cache, mask) for inputs in (hidden, nonfinite))
    assert np.isnan(got[:, readers]).all() and np.isfinite(got[:, ~readers]).all() and not readers.all()
    np.testing.assert_array_equal(got[:, ~readers], sound[:, ~readers])


def test_gradients_are_those_of_plain_jax():
    """Of a prompt without a cache: in plain JAX there is none through the loop over a cache's blocks."""
    hidden, position, _ = operands(40)

    def loss(execution, params, hidden):
        return jnp.sum(jnp.sin(run(execution, params, hidden, position, None, Causal())))

    differentiate = jax.value_and_grad(loss, argnums=(1, 2))
    got, want = (differentiate(Execution(kind), parameters(), hidden) for kind in ("tpu_interpreted", "xla"))
    for gradient, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=TOLERANCE * np.abs(expected).max())


def test_a_kernel_reads_the_slots_of_a_device():
    """The partial softmax of each of two devices over its half of the cache is plain JAX's; one has no token there."""
    random, num_new = np.random.default_rng(6), 40
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    _, position, cache = operands(num_new)
    up = draw(HEADS * 16, RANK) * RANK**-0.5, draw(HEADS * 32, RANK) * RANK**-0.5
    new = draw(2, num_new, RANK), draw(2, num_new, ROPE)
    query, halves = draw(2, num_new, HEADS, 16 + ROPE), CAPACITY // 2
    options = {"scale": 0.2, "causal": True, "window": None}
    for device in range(2):
        first, slots = device * halves, slice(device * halves, (device + 1) * halves)
        own = LatentCache(cache.latent[:, slots], cache.rope_key[:, slots], cache.length).shard(jnp.int32(first))
        mask = OwnSlots(Causal(), jnp.int32(first), jnp.bool_(device == 0))
        read = lambda execution, own=own, mask=mask: read_slots(
            query, *new, *up, position, mask, own, options=options, execution=Execution(execution)
        )
        got, want = (read(execution) for execution in ("tpu_interpreted", "xla"))
        is_read = np.asarray(own.length)[:, None, None] > 0
        assert is_read.tolist() == [[[False]], [[True]]]
        np.testing.assert_allclose(got.output, want.output, atol=TOLERANCE * np.abs(want.output).max())
        np.testing.assert_allclose(*(np.where(is_read, part.lse, 0) for part in (got, want)), atol=1e-4)
        assert np.isneginf(got.lse[0]).all() and np.isneginf(want.lse[0]).all()


@pytest.mark.parametrize(
    ("num_new", "mask", "change", "words"),
    [
        (1, Causal(), {"kept": jnp.ones((2, CAPACITY), bool)}, "marks tokens"),
        (1, Causal(), {"latent": jnp.zeros((2, CAPACITY, RANK), jnp.bfloat16)}, "holds bfloat16"),
        (1, Causal() & Window(9), {}, "read all cached tokens"),
        (40, Causal(), {"kept": jnp.ones((2, CAPACITY), bool)}, "marks tokens"),
        (40, Causal(), {"latent": jnp.zeros((2, CAPACITY, RANK), jnp.bfloat16)}, "holds bfloat16"),
        (40, TREE, {}, "no chain with a window"),
        (40, Causal(), {"latent": jnp.zeros((2, 200, RANK)), "rope_key": jnp.zeros((2, 200, ROPE))}, "multiple of 128"),
    ],
)
def test_what_no_kernel_takes_is_said(num_new, mask, change, words):
    hidden, position, cache = operands(num_new)
    cache = dataclasses.replace(cache, **change)
    with pytest.raises(NotImplementedError, match=words):
        run(Execution("tpu"), parameters(), hidden, position, cache, mask)


def test_what_else_no_kernel_takes():
    hidden, position, cache = operands(40, 2)
    with pytest.raises(NotImplementedError, match="staged tokens need a cache"):
        run(Execution("tpu"), parameters(), hidden, position, cache, Causal())
    mesh = jax.make_mesh((8,), ("tensor",))
    for num_new in (1, 40):
        hidden, position, cache = operands(num_new)
        with pytest.raises(NotImplementedError, match="2 heads do not divide over 8 devices"):
            run(Execution("tpu", mesh), parameters(), hidden, position, cache, Causal())
    query = jax.ShapeDtypeStruct((2, 100, HEADS, RANK), jnp.float32)
    _, _, staged = operands(1, 30)
    with pytest.raises(NotImplementedError, match="at most 128 new and staged tokens, these are 130"):
        select_absorbed(query, query, Causal(), staged, Execution("tpu"))
    wrapped = dataclasses.replace(staged, cache="something else")
    with pytest.raises(NotImplementedError, match=r"the cache \(str\) has no latent_slots for it"):
        select_absorbed(query, query, Causal(), wrapped, Execution("tpu"))
    both = r"the cache \(str\) has no latent_slots .*; it takes at most 128 .*; its mask \(Both\) does not let"
    with pytest.raises(NotImplementedError, match=both):
        select_absorbed(query, query, Causal() & Window(3), wrapped, Execution("tpu"))
    assert select_absorbed(query, query, Causal(), staged, Execution()).backend == "xla"
    assert expanded_kernels.select_expanded(query, 32, Causal(), None, Execution()).backend == "xla"


BATCH, CHIP_CAPACITY, LAYERS = 8, 16384, 1


def deepseek_v2_lite(mesh: Mesh):
    """A layer with the mixer of DeepSeek-V2-Lite, its parameters and a state of decoding, as shapes on the mesh."""
    mixer = MLAConfig(16, 128, 128, 512, None, Rope(64, 1e4, interleaved=True), 192**-0.5, NORM)
    config = ModelConfig(
        1024, 2048, CHIP_CAPACITY, (pre_norm_block(mixer, GatedMLPConfig(1024), NORM),) * LAYERS, NORM, False
    )
    model = Model(config, execution=Execution("tpu", mesh))

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        sharding = TENSOR.sharding(mesh, described, "weight")
        return jax.ShapeDtypeStruct(described.shape, jnp.bfloat16, sharding=sharding)

    def start(sampling: Sampling) -> decoding.DecodeState:
        tokens, one = jnp.zeros((BATCH, CHIP_CAPACITY), jnp.int32), jnp.ones(BATCH, jnp.int32)
        stop_ids = jnp.zeros((BATCH, 0), jnp.int32)
        return empty_state(model, jnp.bfloat16, tokens, one, one, one.astype(jnp.uint32), stop_ids, sampling)

    params = jax.tree.map(weight, config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))
    state = jax.eval_shape(start, Sampling.create(BATCH, config.vocab_size))
    return model, params, jax.tree.map(lambda leaf: on_every_chip(mesh, leaf), state)


def on_every_chip(mesh: Mesh, leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def cache_copies(compiled, size: int) -> int:
    """Copies and transposes of latents (512) or rope keys (64) in the program."""
    shapes = (f"bf16[{BATCH},{CHIP_CAPACITY},{size}]", f"bf16[{BATCH},{size},{CHIP_CAPACITY}]")
    lines = [line for line in compiled.as_text().splitlines() if any(f"= {shape}" in line for shape in shapes)]
    return sum(" copy(" in line or " transpose(" in line for line in lines)


def test_compiled_for_tpu(monkeypatch):
    """Kernels in every layer, and no copy of latents; rope keys change layout on the way in and out (`mla_decode`)."""
    monkeypatch.undo()
    mesh = tpu_mesh("v5e", 4)
    model, params, state = deepseek_v2_lite(mesh)

    def read(params, tokens, position, caches):
        out = model.apply(params, tokens, position, caches)
        return commit(caches, out.cache_updates, jnp.sum(jnp.isfinite(out.hidden[:, :, 0]), axis=1, dtype=jnp.int32))

    tokens = on_every_chip(mesh, jax.ShapeDtypeStruct((BATCH, 512), jnp.int32))
    with jax.default_matmul_precision("default"):
        loop = jax.jit(decoding.autoregressive(model), donate_argnums=1).lower(params, state).compile()
        prompt = jax.jit(read, donate_argnums=3).lower(params, tokens, tokens, state.caches).compile()
    assert count_kernels(loop, "mla_decode") == LAYERS
    assert count_kernels(prompt, "flash_prefill") == 2 * LAYERS  # over the chunk itself, and over the cache
    latent_bytes, rope_bytes = (BATCH * CHIP_CAPACITY * size * 2 for size in (512, 128))
    for compiled in (loop, prompt):
        assert cache_copies(compiled, 512) == 0
        assert cache_copies(compiled, 64) <= 2 * LAYERS
        assert compiled.memory_analysis().alias_size_in_bytes >= LAYERS * (latent_bytes + rope_bytes // 2)
    assert loop.memory_analysis().temp_size_in_bytes < LAYERS * rope_bytes + latent_bytes / 8
