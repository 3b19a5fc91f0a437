"""Implements grouped-query attention (GQA), as in Llama, Mistral, Qwen and Gemma.

GQA, arXiv 2305.13245. The options cover the differences between families: positions by rotation (most), by ALiBi
(BLOOM, MPT) or none, biases, norms on queries, keys and values, clipped projections (OLMoE), a window (Mistral), the
scale of the scores and a soft-cap on them (Gemma 2), sinks (gpt-oss), a gate on the output (Qwen3-Next), values that
are the keys (Gemma 4), queries that grow with their position (Ministral 3).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.alibi import Alibi
from decodax.layers.attention.attend import attend, select_for_slopes
from decodax.layers.attention.mask import Mask, Window
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.head_norms import HeadNorms, Projection
from decodax.layers.kv_cache.full import KVUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._attention import AttentionConfig
from decodax.layers.rope import Rope
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class QueryGrowth:
    """A query at position p is multiplied by 1 + beta log(1 + floor(p / length)): scores sharpen in long rows.

    From the release of Llama 4 (its "attention temperature tuning"); it follows Scalable-Softmax, arXiv 2501.19399.

    beta: of the formula.
    length: tokens, those of the training context.
    """

    beta: float
    length: int

    def factors(self, position: Int[Array, "B T"]) -> Float32[Array, "B T"]:
        """The factor of each query."""
        return 1 + self.beta * jnp.log1p((position // self.length).astype(jnp.float32))


@dataclass(frozen=True)
class GQAConfig(AttentionConfig):
    """The config of grouped-query attention.

    num_heads, num_kv_heads, head_size: N, K, H.
    positions: how the scores depend on positions: a rotation of queries and keys, ALiBi, or not at all (None).
    scale: multiplies query x key.
    qkv_bias: bias of the query, key and value projections.
    out_bias: bias of the output projection.
    head_norms: of queries, keys and values.
    window: tokens a query attends to, itself included (None: all).
    softcap: soft-cap of the scores.
    clip: queries, keys and values are clipped to -clip .. clip.
    sinks: one learned score per head.
    output_gate: "query" also makes a gate for each head (its outputs alternate: query, gate), whose sigmoid multiplies
        the head's output.
    values_are_keys: there is no value projection; values are the keys before their norm.
    query_growth: queries grow with their position.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    positions: Rope | Alibi | None
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: HeadNorms | None = None
    window: int | None = None
    softcap: float | None = None
    clip: float | None = None
    sinks: bool = False
    output_gate: bool = False
    values_are_keys: bool = False
    query_growth: "QueryGrowth | None" = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token (the query itself), got {self.window}")
        if isinstance(self.positions, Rope) and self.positions.rotary_size > self.head_size:
            raise ValueError(
                f"rotary_size must be at most the head size {self.head_size}, got {self.positions.rotary_size}"
            )

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
        if self.values_are_keys:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("value")}
        if self.out_bias:
            weights["out_bias"] = Weight(("D",), (hidden_size,), "zeros")
        if self.sinks:
            weights["sinks"] = Weight(("N",), (self.num_heads,), "zeros")
        if self.head_norms is not None:
            weights |= self.head_norms.weights(self.num_heads, self.num_kv_heads, self.head_size)
        return weights

    @property
    def query_size(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_size * (2 if self.output_gate else 1)

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return GQA(self, hidden_size, execution, name=name)

    def kernel(
        self, batch_size: int, num_new: int, capacity: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        if isinstance(self.positions, Alibi):
            return select_for_slopes(execution)
        return super().kernel(batch_size, num_new, capacity, dtype, execution)

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
        config, norms = self.config, self.config.head_norms
        weight = fetch_own(self, config.weights(self.hidden_size))
        rotated = config.positions.rotation(position, row_length) if isinstance(config.positions, Rope) else None

        def project(name: str) -> Float[Array, "B T _"]:
            return linear(inputs, weight[name], weight.get(f"{name}_bias"))

        def heads(projection: Projection, flat: Float[Array, "B T _"]) -> Float[Array, "B T _ H"]:
            by_head = flat.reshape(*inputs.shape[:2], -1, config.head_size)
            if norms is not None and not (norms.after_rotation and projection != "value"):
                by_head = norms.normed(projection, by_head)
            if config.clip is not None:
                by_head = jnp.clip(by_head, -config.clip, config.clip)
            if projection == "value":
                return by_head
            by_head = by_head if rotated is None else rotated(by_head)
            return norms.normed(projection, by_head) if norms is not None and norms.after_rotation else by_head

        flat_query, gate = project("query"), None
        if config.output_gate:
            pairs = flat_query.reshape(*inputs.shape[:2], config.num_heads, 2, config.head_size)
            flat_query, gate = (pairs[:, :, :, i].reshape(*inputs.shape[:2], -1) for i in range(2))
        flat_key = project("key")
        flat_value = flat_key if config.values_are_keys else project("value")
        query = heads("query", flat_query)
        if config.query_growth is not None:
            query = query * config.query_growth.factors(position)[:, :, None, None].astype(query.dtype)
        key, value = (jnp.moveaxis(x, 1, 2) for x in (heads("key", flat_key), heads("value", flat_value)))
        if config.window is not None:
            mask = mask & Window(config.window)
        slopes = config.positions.slopes(config.num_heads) if isinstance(config.positions, Alibi) else None
        scores = {"scale": config.scale, "softcap": config.softcap, "sink": weight.get("sinks"), "slopes": slopes}
        mixed, _ = attend(query, key, value, position, mask, cache, execution=self.execution, **scores)
        flat = mixed.reshape(*inputs.shape[:2], -1)
        flat = flat if gate is None else flat * jax.nn.sigmoid(gate)
        output = row_parallel_linear(
            flat, weight["out"], weight.get("out_bias"), axis_name="N", execution=self.execution
        )
        return output, KVUpdate(key, value)
