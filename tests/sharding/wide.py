"""Makes tiny models of every kind that divide over eight devices, drafts for them, and one device's results."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.core.weight import Weight
from decodax.layers.alibi import Alibi
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import GatedMLPConfig, MLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.mixers.gqa import GQAConfig, QueryGrowth
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.mixers.short_convolution import ShortConvolutionConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import LayerNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig, SubLayer, pre_norm_block
from decodax.models.embedding import EmbeddingConfig, LearnedPositions
from decodax.models.head import HeadConfig
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import DATA, place
from tests.tiny import NORM

VOCABULARY, WIDTH, NUM_ROWS = 48, 24, 8
LENGTHS = np.array([5, 17, 1, 9, 12, 3, 16, 7])
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (NUM_ROWS, 17))
NEW = 11
NO_STOPS = (-1,)

MLP = GatedMLPConfig(40)
EXPERTS = MoEConfig(TopK(8, 2, "softmax", renormalise=True), 16, shared=GatedMLPConfig(24), shared_gate=True)
GROUPED = GQAConfig(8, 2, 6, Rope(6, 1e4), scale=0.4, qkv_bias=True)  # fewer key-value heads than devices
GROUPED = dataclasses.replace(GROUPED, head_norms=HeadNorms(NORM, NORM, own_weights=True))
WINDOWED = GQAConfig(8, 8, 6, Rope(6, 1e4), scale=0.4, window=5, query_growth=QueryGrowth(0.3, 4))
LATENT = MLAConfig(8, 5, 7, 11, None, Rope(4, 100.0, interleaved=True), 0.35, NORM)
LINEAR = GatedLinearConfig(8, 5, 7, gate_rank=3, gate_temperature=4.0, scale=0.5, norm=NORM)
DELTA = GatedDeltaConfig(8, 8, 5, 7, convolution_width=3, activation="silu", scale=0.5, norm=NORM)
SHORT = ShortConvolutionConfig(32, 3, bias=True)
LAYER_NORM = LayerNormConfig(1e-5)
ALIBI = GQAConfig(8, 2, 6, Alibi(2.0), 0.4, head_norms=HeadNorms(NORM, NORM, across_heads=True), out_bias=True)
PARALLEL = BlockConfig(
    SubLayer(ALIBI, LAYER_NORM), SubLayer(MLPConfig(40, "relu2", bias=True), LAYER_NORM), "parallel", output_scale=True
)
NORMS_AFTER = BlockConfig(SubLayer(SHORT, None, post_norm=NORM), SubLayer(MLP, None, sum_norm=LAYER_NORM))
AROUND = {
    "blocks": {
        "embedding": EmbeddingConfig(1.3, size=16, positions=LearnedPositions(514, offset=2), norm=NORM),
        "head": HeadConfig(bias=True, size=16),
    }
}
LAYERS = {
    "dense": ((GROUPED, MLP), (WINDOWED, MLP)),
    "moe": ((GROUPED, MLP), (WINDOWED, EXPERTS)),
    "mla": ((LATENT, MLP), (LATENT, EXPERTS)),
    "linear": ((LINEAR, MLP), (DELTA, MLP)),
    "blocks": (PARALLEL, NORMS_AFTER),
}
ODD_VOCABULARY = 131
ODD_MLP = GatedMLPConfig(41, "gelu", bias=True)
ODD_EXPERTS = MoEConfig(TopK(8, 2, "softmax", renormalise=True), 17, bias=True, shared=GatedMLPConfig(23))
# Vocabularies and feed-forward widths that no mesh divides, and that are padded.
ODD_LAYERS = {
    "odd": ((GROUPED, GatedMLPConfig(37)), (WINDOWED, ODD_MLP)),
    "odd_tied": ((GROUPED, ODD_MLP), (WINDOWED, ODD_MLP)),
    "odd_moe": ((GROUPED, ODD_MLP), (WINDOWED, ODD_EXPERTS)),
}


# Seen with the linear model on two cores, with and without XLA's concurrent scheduler; not with JAX 0.12.
WAITS_FOR_EVER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="in this program JAX 0.10's CPU devices wait for each other for ever"
)


def runnable(cases: list) -> list:
    """Cases (kind, mesh, ...), those of the linear model only where JAX can run them."""

    def case(one: Any) -> Any:
        marks = [*one.marks, WAITS_FOR_EVER] if one.values[0] == "linear" else one.marks
        return pytest.param(*one.values, marks=marks)

    return list(map(case, cases))


def blocks_of(kind: str) -> tuple[BlockConfig, ...]:
    layers = (LAYERS | ODD_LAYERS)[kind]
    return tuple(layer if isinstance(layer, BlockConfig) else pre_norm_block(*layer, NORM) for layer in layers)


@cache
def model_of(kind: str, mesh: str | None = None, **execution: Any) -> Model:
    """The model over the mesh of this text, by default on one device."""
    blocks = blocks_of(kind)
    vocabulary = ODD_VOCABULARY if kind in ODD_LAYERS else VOCABULARY
    config = ModelConfig(
        vocabulary, WIDTH, 512, blocks, NORM, tie_embeddings=kind == "odd_tied", **AROUND.get(kind, {})
    )
    if mesh is None:
        return Model(config)
    return Model(config, execution=Execution(mesh=fit_mesh(read_mesh(mesh), config), **execution))


@cache
def params_of(kind: str, mesh: str | None = None) -> dict:
    """All random, norms and biases too, drawn by NumPy; over a mesh, sharded by its rules."""
    random = np.random.default_rng(1)
    model = model_of(kind, mesh)

    def draw(path: tuple[Any, ...], weight: Weight) -> jax.Array:
        size = 0.3 if len(weight.shape) == 1 else 1.5 * weight.shape[-1] ** -0.5
        array = ((weight.init == "ones") + size * random.standard_normal(weight.shape)).astype(np.float32)
        if mesh is None:
            return jnp.asarray(array)
        name = "/".join(str(key.key) for key in path)
        return place(model.execution.mesh, model.execution.rules, array, weight, name)

    return jax.tree_util.tree_map_with_path(draw, model.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))


@cache
def draft_of(kind: str) -> dict:
    """A draft of the same kind that mostly agrees."""
    random = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: leaf + 0.05 * random.standard_normal(leaf.shape, np.float32), params_of(kind))


def draft_model(kind: str, model: Model) -> Model:
    """The draft's model, replicated on the devices of `model`."""
    return dataclasses.replace(model, execution=dataclasses.replace(model.execution, rules=DATA))


def start(model: Model, params: dict) -> decoding.DecodeState:
    """The state of the eight prompts, half of them to be sampled."""
    sampling = decoding.Sampling.create(NUM_ROWS, model.config.vocab_size, temperature=[0.0, 0.8] * 4, top_p=0.9)
    rows = np.arange(NUM_ROWS)
    return decoding.prefill(model, params, PROMPTS, LENGTHS, NEW, rows, sampling=sampling, stop_token_ids=NO_STOPS)


def full_logits(model: Model, params: dict) -> jax.Array:
    """Logits after every token of the prompts, as rows of one length, without a cache."""

    @jax.jit
    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return model.logits(params, model.apply(params, tokens, position).hidden)

    return forward(params, np.asarray(PROMPTS[:, :16], np.int32))


@cache
def single_logits(kind: str) -> np.ndarray:
    return np.asarray(full_logits(model_of(kind), params_of(kind)))


@cache
def single_tokens(kind: str) -> np.ndarray:
    """The tokens of plain decoding on one device."""
    model, params = model_of(kind), params_of(kind)
    return np.asarray(jax.jit(decoding.autoregressive(model))(params, start(model, params)).tokens)
