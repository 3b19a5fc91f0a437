"""Selects the kernels that a model's mixers and experts run on this machine, from their configs alone."""

from dataclasses import dataclass
from typing import Any

import jax

from decodax.decoding.sizes import cache_capacity
from decodax.kernels_pallas.grouped_matmul import select_grouped_matmul
from decodax.kernels_pallas.linear_attention import select_linear_attention
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.attention.attend_absorbed import select_absorbed
from decodax.layers.attention.attend_kernels import select_attention
from decodax.layers.attention.expanded_kernels import select_expanded
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.moe.layer import MoEConfig


@dataclass(frozen=True)
class LayerSizes:
    """The sizes that a layer runs on.

    num_tokens: new tokens in each of `batch_size` rows.
    num_cached: cached tokens before them, at most.
    """

    hidden_size: int
    dtype: Any
    batch_size: int
    num_tokens: int
    num_cached: int

    def tokens(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch_size, *shape), self.dtype)

    def cache(self, mixer: Any) -> Any:
        capacity = cache_capacity(self.num_cached, ON_THIS_DEVICE)
        return jax.eval_shape(lambda: mixer.empty_cache(self.batch_size, capacity, self.dtype))


def select_for_layer(layer: Any, sizes: LayerSizes) -> KernelSelection:
    """What runs for a mixer or a mixture of experts (their configs), and why."""
    if isinstance(layer, GQAConfig | MFAConfig | CCAConfig):
        return _attention(layer, sizes)
    if isinstance(layer, MLAConfig):
        return _latent_attention(layer, sizes)
    if isinstance(layer, LightningConfig | GatedLinearConfig) and sizes.num_tokens > 1:
        return _linear_attention(layer, sizes)
    if isinstance(layer, MoEConfig):
        return _experts(layer, sizes)
    return KernelSelection("xla", f"there is no kernel for {type(layer).__name__} on {sizes.num_tokens} tokens")


def _attention(mixer: GQAConfig | MFAConfig | CCAConfig, sizes: LayerSizes) -> KernelSelection:
    num_kv_heads = 1 if isinstance(mixer, MFAConfig) else mixer.num_kv_heads
    window = None if isinstance(mixer, MFAConfig) else mixer.window
    cache = sizes.cache(mixer)
    query = sizes.tokens(sizes.num_tokens, mixer.num_heads, mixer.head_size)
    own = sizes.tokens(num_kv_heads, sizes.num_tokens, mixer.head_size)
    mask = Causal() if window is None else Causal() & Window(window)
    cache = cache.kv if isinstance(mixer, CCAConfig) else cache
    return select_attention(query, own, own, mask, cache, ON_THIS_DEVICE)


def _latent_attention(mixer: MLAConfig, sizes: LayerSizes) -> KernelSelection:
    cache, by_head = sizes.cache(mixer), (sizes.num_tokens, mixer.num_heads)
    if sizes.num_tokens > mixer.most_absorbed_tokens:
        query = sizes.tokens(*by_head, mixer.nope_size + mixer.rope_size)
        return select_expanded(query, mixer.value_size, Causal(), cache, ON_THIS_DEVICE)
    latent, rope = sizes.tokens(*by_head, mixer.latent_rank), sizes.tokens(*by_head, mixer.rope_size)
    return select_absorbed(latent, rope, Causal(), cache, ON_THIS_DEVICE)


def _linear_attention(mixer: LightningConfig | GatedLinearConfig, sizes: LayerSizes) -> KernelSelection:
    state = sizes.cache(mixer).state
    _, num_heads, key_size, value_size = state.shape
    key = sizes.tokens(sizes.num_tokens, num_heads, key_size)
    value = sizes.tokens(sizes.num_tokens, num_heads, value_size)
    size = 1 if isinstance(mixer, LightningConfig) else key_size
    decay = jax.ShapeDtypeStruct((sizes.batch_size, sizes.num_tokens, num_heads, size), state.dtype)
    return select_linear_attention(key, key, value, decay)


def _experts(config: MoEConfig, sizes: LayerSizes) -> KernelSelection:
    num_tokens = int(sizes.batch_size * sizes.num_tokens * config.router.experts_per_token)
    tokens = jax.ShapeDtypeStruct((num_tokens, sizes.hidden_size), sizes.dtype)
    stack = (config.router.num_experts, config.intermediate_size, sizes.hidden_size)
    weight = jax.ShapeDtypeStruct(stack, sizes.dtype)
    weights = (weight, weight) if config.activation == "silu" and not config.bias else (weight,)
    return select_grouped_matmul(tokens, *weights)
