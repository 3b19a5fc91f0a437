"""Implements compressed convolutional attention: projects queries, keys and values down and convolves them.

Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space, arXiv 2510.04476; the grouped form
(CCGQA), as in ZAYA1. Before attention, queries and keys pass two causal convolutions over tokens, one per channel and
one within each head; the mean of their inputs is added; each result is normalised to one length. Half of a token's
values are computed from the token before it. With widths of 2 and 2 a token's query and key depend on three tokens.

Weights and order as in transformers' zaya, which differs from the paper's text in that the key's temperature is a plain
factor. The convolutions' weights are matrices, [channels, taps] and [channels, inputs x taps]: the channels are all
queries, then all keys, as in its files.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.attention.attend import attend
from decodax.layers.attention.mask import Mask, Window
from decodax.layers.attention.predecessors import predecessors
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.tailed import TailedCache, TailedUpdate
from decodax.layers.kv_cache.view import CacheView, committed, part, staged_tokens
from decodax.layers.mixers._attention import AttentionConfig
from decodax.layers.rope import Rope
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class CCAConfig(AttentionConfig):
    """The config of compressed convolutional attention.

    num_heads, num_kv_heads, head_size: N, K, H.
    rope: rotary embedding of queries and keys.
    scale: multiplies query x key.
    depthwise_width, grouped_width: tokens that the convolutions read, their own included.
    bias: of the projections; the convolutions always have one.
    window: tokens a query attends to, itself included (None: all).
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: Rope
    scale: float
    depthwise_width: int = 2
    grouped_width: int = 2
    bias: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.num_kv_heads * self.head_size % 2:
            raise ValueError(
                f"num_kv_heads x head_size must be even, as values have two halves, got {self.num_kv_heads} x "
                f"{self.head_size}"
            )
        if self.rope.rotary_size > self.head_size:
            raise ValueError(f"rotary_size must be at most the head size {self.head_size}, got {self.rope.rotary_size}")
        if min(self.depthwise_width, self.grouped_width) < 1 or self.width < 2:
            raise ValueError(
                "convolutions must read at least their own token, and one of them the token before, got widths "
                f"{self.depthwise_width} and {self.grouped_width}"
            )

    @property
    def width(self) -> int:
        """W, tokens that a query depends on, its own included."""
        return self.depthwise_width + self.grouped_width - 1

    @property
    def num_convolved(self) -> int:
        """Channels that are convolved: all heads' queries, then all keys."""
        return (self.num_heads + self.num_kv_heads) * self.head_size

    @property
    def half_values(self) -> int:
        return self.num_kv_heads * self.head_size // 2

    def weights(self, hidden_size: int) -> dict[str, Any]:
        wide, narrow = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        weights: dict[str, Any] = {
            "query": Weight(("NH", "D"), (wide, hidden_size), block_size=self.head_size),
            "key": Weight(("KH", "D"), (narrow, hidden_size), block_size=self.head_size),
            "value": Weight(("KH", "D"), (self.half_values, hidden_size)),
            "delayed_value": Weight(("KH", "D"), (self.half_values, hidden_size)),
            "depthwise": Weight(("H", "W"), (self.num_convolved, self.depthwise_width)),
            "depthwise_bias": Weight(("H",), (self.num_convolved,), "zeros"),
            "grouped": Weight(("H", "HW"), (self.num_convolved, self.head_size * self.grouped_width)),
            "grouped_bias": Weight(("H",), (self.num_convolved,), "zeros"),
            "key_temperature": Weight(("K",), (self.num_kv_heads,), "ones"),
            "out": Weight(("D", "NH"), (hidden_size, wide), block_size=self.head_size),
        }
        if self.bias:
            biased = {"query": wide, "key": narrow, "value": self.half_values, "delayed_value": self.half_values}
            weights |= {
                f"{name}_bias": Weight((weights[name].axes[0],), (size,), "zeros") for name, size in biased.items()
            }
            weights["out_bias"] = Weight(("D",), (hidden_size,), "zeros")
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return CCA(self, hidden_size, execution, name=name)

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> TailedCache:
        """Keys and values as `policy` caches them, and the tail of convolution inputs and of delayed values."""
        tail_shape = (self.width - 1, self.num_convolved + self.half_values)
        return TailedCache.empty(batch_size, self.num_kv_heads, capacity, self.head_size, tail_shape, dtype, policy)

    def invariant_unsupported_reason(self) -> str | None:
        return "convolutions read tokens that are in no cache"

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> TailedUpdate:
        num_columns = self.num_convolved + self.half_values
        return TailedUpdate.empty(batch_size, self.num_kv_heads, num_tokens, self.head_size, num_columns, dtype)


class CCA(nn.Module):
    """out(attend(rope(norm(conv(q) + mean)), rope(norm(conv(k) + mean) temperature), [W_1 x_t; W_2 x_(t-1)])).

    Reads the cache, returns the output and the cache update.
    """

    config: CCAConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        row_length: Int[Array, "B T"],
        cache: CacheView,
        mask: Mask,
    ) -> tuple[Float[Array, "B T D"], TailedUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))

        def project(name: str) -> Float[Array, "B T _"]:
            return linear(inputs, weight[name], weight.get(f"{name}_bias"))

        before, staged = committed(cache), staged_tokens(cache)
        staged = None if staged is None else (staged[0].columns, staged[1])
        # The bias is added later: the first token's delayed values are the bias, as the token before it is zero.
        delayed = linear(inputs, weight["delayed_value"])
        columns = jnp.concatenate([project("query"), project("key"), delayed], axis=2)
        if before is None:
            tail = jnp.zeros((inputs.shape[0], config.width - 1, columns.shape[2]), columns.dtype)
        else:
            tail = before.tail
        window = predecessors(columns, position, mask, tail, staged)

        query, key = _convolved(config, weight, window[..., : config.num_convolved])
        delayed = window[:, :, -2, config.num_convolved :]
        if config.bias:
            delayed = delayed + weight["delayed_value_bias"][None, None]
        value = jnp.concatenate([project("value"), delayed], axis=2)
        value = value.reshape(*inputs.shape[:2], config.num_kv_heads, config.head_size)

        rotated = config.rope.rotation(position, row_length)
        query = rotated(query)
        key, value = (jnp.moveaxis(heads, 1, 2) for heads in (rotated(key), value))
        if config.window is not None:
            mask = mask & Window(config.window)
        kv_cache = part(cache, lambda cache: cache.kv, lambda update: update.kv)
        options = {"scale": config.scale, "softcap": None, "execution": self.execution}
        mixed, _ = attend(query, key, value, position, mask, kv_cache, **options)
        flat, over_heads = mixed.reshape(*inputs.shape[:2], -1), {"axis_name": "N", "execution": self.execution}
        output = row_parallel_linear(flat, weight["out"], weight.get("out_bias"), **over_heads)
        return output, TailedUpdate(KVUpdate(key, value), columns)


def _convolved(
    config: CCAConfig, weight: dict[str, Array], window: Float[Array, "B T W I"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Queries and keys of all heads, in float32 until normalised to length sqrt(H), for keys times a temperature.

    Where the convolution within heads reads before a row's first token, the one per channel has read zeros.
    """
    dtype, tokens = window.dtype, window.shape[:2]
    by_head = (config.num_heads + config.num_kv_heads, config.head_size)
    width, wide = config.grouped_width, {"preferred_element_type": jnp.float32}

    taps = [window[:, :, start : start + width] for start in range(config.depthwise_width)]
    depthwise = jnp.einsum("bjtwc,cj->btwc", jnp.stack(taps, axis=1), weight["depthwise"], **wide)
    depthwise = depthwise + weight["depthwise_bias"].astype(jnp.float32)[None, None, None]
    depthwise = depthwise.astype(dtype).reshape(*tokens, width, *by_head)
    kernel = weight["grouped"].reshape(*by_head, config.head_size, width)
    grouped = jnp.einsum("btwni,noiw->btno", depthwise, kernel, **wide)
    grouped = grouped + weight["grouped_bias"].astype(jnp.float32).reshape(by_head)[None, None]

    before = window[:, :, -1].astype(jnp.float32).reshape(*tokens, *by_head)
    query, key = jnp.split(before, (config.num_heads,), axis=2)
    query = query.reshape(*tokens, config.num_kv_heads, -1, config.head_size)
    mean = (query + key[:, :, :, None]) / 2
    query_mean, key_mean = mean.reshape(*tokens, config.num_heads, -1), jnp.mean(mean, axis=3)
    query, key = jnp.split(grouped, (config.num_heads,), axis=2)
    temperature = weight["key_temperature"].astype(jnp.float32)[None, None, :, None]
    query, key = _of_length_one(query + query_mean), _of_length_one(key + key_mean) * temperature
    length = config.head_size**0.5
    return (query * length).astype(dtype), (key * length).astype(dtype)


def _of_length_one(heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Each head normalised to length 1; zero stays zero."""
    square = jnp.sum(jnp.square(heads), axis=3, keepdims=True)
    return heads * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(jnp.float32).eps ** 2))
