"""The MoE layer equals NumPy float64 with its options, and a model of such layers is the same token by token."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from decodax.core.weight import Weight
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.feed_forward import ClampedSwiGLU, GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.moe.dispatch.all_to_all import AllToAll
from decodax.layers.moe.layer import MoEConfig, MoENorms
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routers.expert_choice import ExpertChoice
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model, commit
from decodax.sharding.rules import Rules, place
from tests.oracles.mixture_of_experts import activate, mixture, route

BATCH, TOKENS, WIDTH = 2, 5, 7
ROUTER = TopK(6, 2, "softmax", True)
CLAMPED = ClampedSwiGLU(1.702, 0.8)
SHARED = GatedMLPConfig(13)
NORM = RMSNormConfig(1e-5)
CASES = {
    "plain": MoEConfig(ROUTER, 11),
    "gpt-oss": MoEConfig(TopK(6, 3, "softmax", True, router_bias=True), 11, CLAMPED, bias=True),
    "deepseek": MoEConfig(TopK(6, 2, "sigmoid", True, 2.5, selection_bias=True), 11, shared=SHARED),
    "qwen2": MoEConfig(ROUTER, 11, shared=SHARED, shared_gate=True),
    "gemma4": MoEConfig(
        TopK(6, 3, "softmax", True, logit_scale=0.7, expert_scale=True), 11, shared=SHARED, norms=MoENorms(*[NORM] * 5)
    ),
    "deepspeed": MoEConfig(TopK(6, 1, "softmax", False), 11, shared=SHARED, residual_mix=True),
}


def is_weight(leaf):
    return isinstance(leaf, Weight)


def random_params(config, seed):
    random = np.random.default_rng(seed)
    described = config.weights(WIDTH)
    return jax.tree.map(
        lambda w: (random.standard_normal(w.shape) * (w.shape[-1] if len(w.shape) > 1 else 4) ** -0.5).astype(
            np.float32
        ),
        described,
        is_leaf=is_weight,
    )


def layer(config, execution=ON_THIS_DEVICE):
    module = config.module(WIDTH, "moe", execution)
    return jax.jit(lambda params, inputs: module.apply({"params": params}, inputs))


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(name):
    config = CASES[name]
    params = random_params(config, 0)
    inputs = np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    output, routes = layer(config)(params, jnp.asarray(inputs))

    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    tokens, router = inputs.reshape(-1, WIDTH).astype(np.float64), exact["router"]

    def normed(name, values):
        if config.norms is None:
            return values
        return values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-5) * exact[f"{name}_norm"]["weight"]

    expert, gate = route(
        config.router.logit_scale * (normed("router", tokens) @ router["weight"].T + router.get("bias", 0)),
        config.router.experts_per_token,
        score=config.router.score,
        renormalise=config.router.renormalise,
        scale=config.router.scale,
        selection_bias=router.get("selection_bias", 0),
    )
    gate = gate * router.get("expert_scale", np.ones(6))[expert]
    wanted = normed(
        "experts_post", mixture(normed("experts", tokens), expert, gate, exact["experts"], config.activation)
    )
    if config.shared is not None:
        mlp = exact["shared"]
        read = normed("shared", tokens)
        shared = activate("silu", read @ mlp["gate"].T, read @ mlp["up"].T) @ mlp["down"].T
        shared = normed("shared_post", shared)
        if config.shared_gate:
            shared = shared / (1 + np.exp(-tokens @ exact["shared_gate"].T))
        if config.residual_mix:
            shares = np.exp(tokens @ exact["residual_mix"].T + exact["residual_mix_bias"])
            shares /= shares.sum(1, keepdims=True)
            wanted, shared = wanted * shares[:, :1], shared * shares[:, 1:]
        wanted = wanted + shared
    np.testing.assert_allclose(output.reshape(wanted.shape), wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(routes.expert.reshape(expert.shape), expert)
    np.testing.assert_allclose(routes.gate.reshape(gate.shape), gate, rtol=2e-5)
    assert routes.expert.shape == (BATCH, TOKENS, expert.shape[1]) and routes.num_overflowed == 0


def test_bfloat16_stays_bfloat16():
    config = CASES["qwen2"]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_params(config, 0))
    inputs = np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    output, routes = layer(config)(params, jnp.asarray(inputs, jnp.bfloat16))
    exact, wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, jnp.asarray(inputs, jnp.bfloat16)))
    wanted, same = layer(config)(exact, wide)
    np.testing.assert_array_equal(routes.expert, same.expert)
    assert output.dtype == jnp.bfloat16 and routes.gate.dtype == jnp.float32
    # Rounded by up to 2^-9 of itself at each of about six steps.
    np.testing.assert_allclose(output.astype(np.float32), wanted, rtol=0, atol=6 * 2**-9 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared_gate": True}, "give `shared`"),
        ({"residual_mix": True}, "give `shared`"),
        ({"shared": SHARED, "shared_gate": True, "residual_mix": True}, "choose one"),
        ({"norms": MoENorms(*[NORM] * 5)}, "give `shared` and no mixing"),
        ({"activation": "swish2"}, r"activation must be one of \['gelu', .*'silu'\] or a ClampedSwiGLU"),
        ({"placement": Placement.contiguous(5, 2)}, "of the router's 6 experts, got one of 5"),
        ({"placement": Placement.contiguous(6, 2, 2)}, "intermediate_size must divide into the placement's 2 slices"),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ValueError, match=words):
        MoEConfig(ROUTER, 11, **options)


NORM = RMSNormConfig(1e-5)
CAPACITY, VOCABULARY, LENGTH = 16, 37, 9


def tiny_model(placement=None, execution=ON_THIS_DEVICE):
    """A dense layer, then two of experts, the second with more experts (a pyramid)."""
    mixer = GQAConfig(6, 2, 8, Rope(8, 1e4), scale=8**-0.5)
    first = MoEConfig(TopK(8, 2, "sigmoid", True, selection_bias=True), 12, shared=SHARED, placement=placement)
    second = MoEConfig(TopK(16, 3, "softmax", True), 12, shared=SHARED, residual_mix=True)
    blocks = tuple(pre_norm_block(mixer, feed_forward, NORM) for feed_forward in (GatedMLPConfig(29), first, second))
    return Model(ModelConfig(VOCABULARY, 23, 512, blocks, NORM, tie_embeddings=True), execution=execution)


MODEL = tiny_model()
PARAMS = jax.tree.map(lambda leaf: 2.0 * leaf, MODEL.init(jax.random.key(0)))
INPUT = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH))


@cache
def forward(model):
    @jax.jit
    def run(params, tokens, position, caches):
        out = model.apply(params, tokens, position, caches)
        return model.logits(params, out.hidden), out.cache_updates, out.routes

    return run


def whole(model=MODEL, params=PARAMS, tokens=INPUT):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return forward(model)(params, jnp.asarray(tokens), position, None)


def assert_same(got, want):
    """To 1e-5 of the largest logit."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_model_token_by_token_and_row_by_row():
    together, _, routes = whole()
    assert routes[0] is None and [r.expert.shape for r in routes[1:]] == [(3, LENGTH, 2), (3, LENGTH, 3)]
    caches, run = MODEL.empty_cache(3, CAPACITY, jnp.float32), forward(MODEL)
    for index in range(LENGTH):
        position = jnp.full((3, 1), index, jnp.int32)
        logits, rows, chosen = run(PARAMS, jnp.asarray(INPUT[:, index : index + 1]), position, caches)
        assert_same(logits[:, 0], np.asarray(together)[:, index])
        np.testing.assert_array_equal(chosen[2].expert[:, 0], routes[2].expert[:, index])
        caches = jax.jit(commit)(caches, rows, jnp.ones(3, jnp.int32))
    assert_same(whole(tokens=INPUT[1:2])[0][0], np.asarray(together)[1])


@pytest.mark.parametrize("experts", [None, AllToAll(2)], ids=["gathered", "exchanged"])
@pytest.mark.quick_cases(1)
def test_a_model_on_eight_devices(experts):
    """Experts split over four of the devices, some twice, give the logits of one device."""
    kinds = (AxisType.Auto,) * 2
    mesh, rules = jax.make_mesh((4, 2), ("expert", "other"), axis_types=kinds), Rules((("E", "expert"),))
    copies = Placement(8, 4, 3, tuple(((e % 4, e // 4),) if e < 4 else ((e % 4, 2), (e % 4, 1)) for e in range(8)))
    model = tiny_model(copies, Execution(mesh=mesh, rules=rules, experts=experts))
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    params["blocks_1"]["feed_forward"]["experts"] = copies.arrange(PARAMS["blocks_1"]["feed_forward"]["experts"])
    params = jax.tree.map(
        lambda weight, leaf: place(mesh, rules, leaf, weight, "weight"),
        model.config.weights(),
        params,
        is_leaf=is_weight,
    )
    logits, _, routes = whole(model, params)
    wanted, _, same = whole()
    assert_same(logits, np.asarray(wanted))
    np.testing.assert_array_equal(routes[1].expert, same[1].expert)
    assert (routes[1].num_overflowed > 0) == (experts is not None)


def test_the_dense_dispatch_in_a_model():
    dense = dataclasses.replace(MODEL, execution=Execution(experts="dense"))
    assert_same(whole(dense)[0], np.asarray(whole()[0]))


def test_experts_that_choose_are_a_layer_too():
    config = MoEConfig(ExpertChoice(6, 1.5), 11)
    params = random_params(config, 2)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    output, routes = layer(config)(params, jnp.asarray(inputs))
    flat = [np.asarray(field).reshape(BATCH * TOKENS, 6) for field in (routes.expert, routes.gate)]
    wanted = mixture(inputs.reshape(-1, WIDTH), *flat, params["experts"])
    np.testing.assert_allclose(output.reshape(wanted.shape), wanted, rtol=0, atol=1e-5)
