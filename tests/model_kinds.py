"""Makes tiny models of every kind, a draft and prompts for each, and runs plain decoding on them."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from decodax import decoding
from decodax.core.weight import Weight
from decodax.layers.alibi import Alibi
from decodax.layers.feed_forward import GatedMLPConfig, MLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.mixers.gqa import GQAConfig, QueryGrowth
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.mixers.short_convolution import ShortConvolutionConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import LayerNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig, Residual, SubLayer, pre_norm_block
from decodax.models.embedding import EmbeddingConfig, LearnedPositions
from decodax.models.head import HeadConfig
from decodax.models.model import Model
from tests.tiny import NORM

VOCABULARY, WIDTH = 13, 17
LENGTHS = np.array([5, 13, 1])
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 13))
NEW = np.array([19, 14, 23])
NO_STOPS = (-1, -1)

MLP = GatedMLPConfig(19)
EXPERTS = MoEConfig(TopK(5, 2, "softmax", renormalise=True), 7, shared=GatedMLPConfig(11), shared_gate=True)
GROUPED_EXPERTS = MoEConfig(
    TopK(6, 2, "sigmoid", renormalise=True, scale=1.5, selection_bias=True, num_groups=3, num_groups_kept=2,
         group_score="top2_sum"), 7,
)  # fmt: skip
WINDOWED = GQAConfig(4, 2, 8, Rope(8, 1e4), scale=0.4, window=5, query_growth=QueryGrowth(0.3, 4))
FULL = GQAConfig(2, 1, 8, Rope(8, 1e4), scale=0.4, qkv_bias=True, head_norms=HeadNorms(NORM, NORM, own_weights=True))
LATENT = MLAConfig(3, 5, 7, 11, None, Rope(4, 100.0, interleaved=True), 0.35, NORM)
COMPRESSED = dataclasses.replace(LATENT, query_rank=8, bias=True, rope=Rope(4, 100.0))
DELTA = GatedDeltaConfig(1, 2, 5, 7, convolution_width=3, activation="silu", scale=0.5, norm=NORM)
LINEAR = GatedLinearConfig(2, 5, 7, gate_rank=3, gate_temperature=4.0, scale=0.5, norm=NORM)
LIGHTNING = LightningConfig(2, 5, slopes=(0.1, 0.7), activation="silu", scale=1.0, norm=NORM)
SHORT = ShortConvolutionConfig(9, 3)
LAYER_NORM = LayerNormConfig(1e-5)
NO_WEIGHT = dataclasses.replace(NORM, has_weight=False)
ALIBI = GQAConfig(
    4, 2, 8, Alibi(2.0), 0.4, head_norms=HeadNorms(NORM, None, NO_WEIGHT), values_are_keys=True, window=6, out_bias=True
)
NORMS_AFTER = BlockConfig(SubLayer(ALIBI, None, post_norm=NORM), SubLayer(MLP, None, sum_norm=LAYER_NORM))
SMALL = Residual(add=0.3)
PARALLEL = BlockConfig(
    SubLayer(SHORT, LAYER_NORM, residual=SMALL),
    SubLayer(MLPConfig(19, "relu"), LAYER_NORM, residual=SMALL),
    "parallel",
    output_scale=True,
)
AROUND = {
    "blocks": {
        "embedding": EmbeddingConfig(1.3, size=11, positions=LearnedPositions(514, offset=2), norm=NORM),
        "head": HeadConfig(softcap=5.0, bias=True, size=11),
    }
}
LAYERS = {
    "moe": ((WINDOWED, MLP), (FULL, EXPERTS)),
    "mla": ((COMPRESSED, MLP), (LATENT, GROUPED_EXPERTS)),
    "hybrid": ((WINDOWED, MLP), (DELTA, MLP)),
    "recurrent": ((LIGHTNING, MLP), (LINEAR, EXPERTS)),
    "blocks": (NORMS_AFTER, PARALLEL),
}
IS_RECURRENT = (DELTA, LINEAR, LIGHTNING, SHORT)


@cache
def model_of(kind: str) -> Model:
    blocks = tuple(layer if isinstance(layer, BlockConfig) else pre_norm_block(*layer, NORM) for layer in LAYERS[kind])
    around = {"head": HeadConfig(softcap=5.0)} | AROUND.get(kind, {})
    return Model(ModelConfig(VOCABULARY, WIDTH, 512, blocks, NORM, tie_embeddings=False, **around))


@cache
def params_of(kind: str) -> dict:
    """All random, norms and biases too. Layers after the first add less, so that early exits are often right.

    Drawn by NumPy, as compiling the draws of all shapes takes seconds.
    """
    random = np.random.default_rng(1)

    def draw(path, weight):
        names = [key.key for key in path]
        size = 0.3 if len(weight.shape) == 1 else 1.5 * weight.shape[-1] ** -0.5
        size = 0.4 * size if names[-1] in ("out", "down") and names[0] not in ("blocks_0", "head") else size
        return jnp.asarray((weight.init == "ones") + size * random.standard_normal(weight.shape), jnp.float32)

    weights = model_of(kind).config.weights()
    return jax.tree_util.tree_map_with_path(draw, weights, is_leaf=lambda leaf: isinstance(leaf, Weight))


@cache
def draft_of(kind: str) -> dict:
    """A draft of the same kind that mostly agrees."""
    random = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: leaf + 0.05 * random.standard_normal(leaf.shape, np.float32), params_of(kind))


def start(kind: str, params=None, **options) -> decoding.DecodeState:
    """The state of the three prompts: the first is continued greedily, the others are sampled."""
    sampling = decoding.Sampling.create(3, VOCABULARY, temperature=[0.0, 0.7, 1.3])
    params = params_of(kind) if params is None else params
    return decoding.prefill(
        model_of(kind), params, PROMPTS, LENGTHS, NEW, np.arange(3), sampling=sampling, stop_token_ids=NO_STOPS,
        **options,
    )  # fmt: skip


@cache
def plain(kind: str) -> decoding.DecodeState:
    """The state in which plain decoding ends."""
    return jax.jit(decoding.autoregressive(model_of(kind)))(params_of(kind), start(kind))


@cache
def full_forward(kind: str):
    """Updates and logits of texts, without a cache: (params, tokens [B, T]) -> (cache updates, logits)."""

    @jax.jit
    def forward(params, tokens):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out = model_of(kind).apply(params, tokens, position)
        return out.cache_updates, model_of(kind).logits(params, out.hidden)

    return forward
