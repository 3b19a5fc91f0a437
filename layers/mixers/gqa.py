"""Implements grouped-query attention (GQA), as in Llama, Mistral, Qwen and Gemma.

GQA, arXiv 2305.13245. The options cover the differences between families: biases, a norm on each head's query and key
(Qwen 3) or on all heads at once (OLMoE), clipped projections (OLMoE), a window (Mistral), the scale of the scores and a
soft-cap on them (Gemma 2), sinks (gpt-oss), a gate on the output (Qwen3-Next).
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
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._attention import AttentionConfig
from decodax.layers.norm import Norm
from decodax.layers.rope import Rope, rotate
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class GQAConfig(AttentionConfig):
    """The config of grouped-query attention.

    num_heads, num_kv_heads, head_size: N, K, H.
    rope: rotary embedding of queries and keys.
    scale: multiplies query x key.
    qkv_bias: bias of the query, key and value projections.
    out_bias: bias of the output projection.
    head_norm: norm of each head's query and key.
    window: tokens a query attends to, itself included (None: all).
    softcap: soft-cap of the scores.
    norm_across_heads: `head_norm` is one norm over all heads.
    clip: queries, keys and values are clipped to -clip .. clip.
    sinks: one learned score per head.
    output_gate: "query" also makes a gate for each head (its outputs alternate: query, gate), whose sigmoid multiplies
        the head's output.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: Rope
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    head_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None
    norm_across_heads: bool = False
    clip: float | None = None
    sinks: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token (the query itself), got {self.window}")
        if self.rope.rotary_size > self.head_size:
            raise ValueError(f"rotary_size must be at most the head size {self.head_size}, got {self.rope.rotary_size}")

    def weights(self, hidden_size: int) -> dict[str, Any]:
        wide, narrow = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        per_head = self.query_size // self.num_heads
        weights: dict[str, Any] = {
            "query": Weight(("NH", "D"), (self.query_size, hidden_size), block_size=per_head),
            "key": Weight(("KH", "D"), (narrow, hidden_size), block_size=self.head_size),
            "value": Weight(("KH", "D"), (narrow, hidden_size), block_size=self.head_size),
            "out": Weight(("D", "NH"), (hidden_size, wide), block_size=self.head_size),
        }
        if self.qkv_bias:
            weights["query_bias"] = Weight(("NH",), (self.query_size,), "zeros", block_size=per_head)
            weights["key_bias"] = Weight(("KH",), (narrow,), "zeros", block_size=self.head_size)
            weights["value_bias"] = Weight(("KH",), (narrow,), "zeros", block_size=self.head_size)
        if self.out_bias:
            weights["out_bias"] = Weight(("D",), (hidden_size,), "zeros")
        if self.sinks:
            weights["sinks"] = Weight(("N",), (self.num_heads,), "zeros")
        if self.head_norm is not None:
            weights["query_norm"] = self.head_norm.weights(*self.normed("query"), self.head_size)
            weights["key_norm"] = self.head_norm.weights(*self.normed("key"), self.head_size)
        return weights

    @property
    def query_size(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_size * (2 if self.output_gate else 1)

    def normed(self, name: str) -> tuple[int, str]:
        """The number of coordinates of the norm of queries or keys, and their logical axes."""
        if not self.norm_across_heads:
            return self.head_size, "H"
        return (
            (self.num_heads * self.head_size, "NH") if name == "query" else (self.num_kv_heads * self.head_size, "KH")
        )

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return GQA(self, hidden_size, execution, name=name)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> KVUpdate:
        return KVUpdate.empty(batch_size, self.num_kv_heads, num_tokens, self.head_size, dtype)


class GQA(nn.Module):
    """out(attend(rope(query(x)), rope(key(x)), value(x))): reads the cache, returns the output and the cache update."""

    config: GQAConfig
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
    ) -> tuple[Float[Array, "B T D"], KVUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))

        def project(name: str) -> Float[Array, "B T _"]:
            return linear(inputs, weight[name], weight.get(f"{name}_bias"))

        def heads(name: str, flat: Float[Array, "B T _"]) -> Float[Array, "B T _ H"]:
            by_head = (*inputs.shape[:2], -1, config.head_size)
            if config.head_norm is not None and name != "value":
                norm = config.head_norm.module(*config.normed(name), name=f"{name}_norm")
                flat = norm(flat if config.norm_across_heads else flat.reshape(by_head))
            if config.clip is not None:
                flat = jnp.clip(flat, -config.clip, config.clip)
            return flat.reshape(by_head)

        flat_query, gate = project("query"), None
        if config.output_gate:
            pairs = flat_query.reshape(*inputs.shape[:2], config.num_heads, 2, config.head_size)
            flat_query, gate = (pairs[:, :, :, i].reshape(*inputs.shape[:2], -1) for i in range(2))
        cos, sin = config.rope.angles(position, row_length)
        query = rotate(heads("query", flat_query), cos, sin)
        key = jnp.moveaxis(rotate(heads("key", project("key")), cos, sin), 1, 2)
        value = jnp.moveaxis(heads("value", project("value")), 1, 2)
        if config.window is not None:
            mask = mask & Window(config.window)
        scores = {"scale": config.scale, "softcap": config.softcap, "sink": weight.get("sinks")}
        mixed, _ = attend(query, key, value, position, mask, cache, execution=self.execution, **scores)
        flat = mixed.reshape(*inputs.shape[:2], -1)
        flat = flat if gate is None else flat * jax.nn.sigmoid(gate)
        output = row_parallel_linear(
            flat, weight["out"], weight.get("out_bias"), axis_name="N", execution=self.execution
        )
        return output, KVUpdate(key, value)
