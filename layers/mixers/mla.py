"""Implements multi-head latent attention (MLA): caches one latent per token, from which heads get keys and values.

DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, arXiv 2405.04434; DeepSeek-V3
Technical Report, arXiv 2412.19437. Weights as in transformers' deepseek_v2 and deepseek_v3, but for `kv_b_proj`, which
is split into `key_up` and `value_up`.
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
from decodax.kernels_pallas.decode.new_tokens import MAX_NEW_TOKENS
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.attention.attend_absorbed import attend_absorbed, select_absorbed
from decodax.layers.attention.attend_expanded import attend_expanded
from decodax.layers.attention.expansion import Expansion
from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.view import CacheView, committed
from decodax.layers.mixers.contract import MixingCost
from decodax.layers.norm import Norm
from decodax.layers.rope import Rope
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class MLAConfig:
    """The config of multi-head latent attention.

    num_heads: N.
    nope_size: numbers of a head's key without position; rope.rotary_size numbers have one.
    value_size: numbers of a head's value.
    latent_rank: R, numbers of a latent.
    query_rank: numbers of a query latent; None for queries from the input.
    rope: rotary embedding of the rope numbers.
    scale: multiplies query x key.
    norm: of latents and query latents.
    bias: of the projections to latents and of the output projection.
    """

    num_heads: int
    nope_size: int
    value_size: int
    latent_rank: int
    query_rank: int | None
    rope: Rope
    scale: float
    norm: Norm
    bias: bool = False

    @property
    def rope_size(self) -> int:
        return self.rope.rotary_size

    @property
    def most_absorbed_tokens(self) -> int:
        """The most new tokens after a cache that attend to the latents themselves (`attend_absorbed.py`).

        T tokens cost T (2 R + H) multiplications per head and cached token there, and T (I + H + J) + R (I + J) with
        expanded keys and values; with DeepSeek-V3's sizes, the first are fewer up to T = 170. Its kernel supports 128.
        """
        expanded_size = self.nope_size + self.value_size
        more_per_token = 2 * self.latent_rank - expanded_size
        if more_per_token <= 0:
            return MAX_NEW_TOKENS
        return min(self.latent_rank * expanded_size // more_per_token, MAX_NEW_TOKENS)

    def weights(self, hidden_size: int) -> dict[str, Any]:
        per_head, rank = self.nope_size + self.rope_size, self.latent_rank
        query_size = self.num_heads * per_head
        keys, values = self.num_heads * self.nope_size, self.num_heads * self.value_size
        weights: dict[str, Any] = {
            "latent_down": Weight(("R", "D"), (rank + self.rope_size, hidden_size)),
            "latent_norm": self.norm.weights(rank, "R"),
            "key_up": Weight(("NH", "R"), (keys, rank), block_size=self.nope_size),
            "value_up": Weight(("NH", "R"), (values, rank), block_size=self.value_size),
            "out": Weight(("D", "NH"), (hidden_size, values), block_size=self.value_size),
        }
        if self.query_rank is None:
            weights["query"] = Weight(("NH", "D"), (query_size, hidden_size), block_size=per_head)
        else:
            weights["query_down"] = Weight(("R", "D"), (self.query_rank, hidden_size))
            weights["query_norm"] = self.norm.weights(self.query_rank, "R")
            weights["query_up"] = Weight(("NH", "R"), (query_size, self.query_rank), block_size=per_head)
        if self.bias:
            weights["latent_down_bias"] = Weight(("R",), (rank + self.rope_size,), "zeros")
            weights["out_bias"] = Weight(("D",), (hidden_size,), "zeros")
            if self.query_rank is not None:
                weights["query_down_bias"] = Weight(("R",), (self.query_rank,), "zeros")
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return MLA(self, hidden_size, execution, name=name)

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> LatentCache:
        """As in `Mixer.empty_cache`."""
        track_kept = policy is MarkedCache
        return LatentCache.empty(batch_size, capacity, self.latent_rank, self.rope_size, dtype, track_kept=track_kept)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> LatentUpdate:
        return LatentUpdate.empty(batch_size, num_tokens, self.latent_rank, self.rope_size, dtype)

    def unsupported_policy_reason(self, policy: CachePolicy) -> str | None:
        own = policy in (KVCache, MarkedCache)
        return None if own else "latent attention caches latents, and no keys and values"

    def invariant_unsupported_reason(self) -> str | None:
        return "latent attention reads latents in two ways, by the number of tokens"

    def mixing_cost(self, num_new: int, num_cached: int) -> MixingCost:
        num_keys, own = num_cached + (num_new + 1) / 2, (self.num_heads, self.latent_rank)
        if num_new <= self.most_absorbed_tokens:
            flops = 2 * self.num_heads * (2 * self.latent_rank + self.rope_size) * num_keys
            return MixingCost(flops, num_cached, *own)
        mixing = 2 * self.num_heads * (self.nope_size + self.rope_size + self.value_size) * num_keys
        expansion = 2 * self.latent_rank * self.num_heads * (self.nope_size + self.value_size)
        return MixingCost(mixing + expansion * num_cached / num_new, num_cached, *own)

    def kernel(
        self, batch_size: int, num_new: int, capacity: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        from decodax.layers.attention.expanded_kernels import select_expanded  # late: not before a kernel is asked for

        def operand(size: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, num_new, self.num_heads, size), dtype)

        cache = jax.eval_shape(lambda: self.empty_cache(batch_size, capacity, dtype))
        if num_new > self.most_absorbed_tokens:
            query = operand(self.nope_size + self.rope_size)
            return select_expanded(query, self.value_size, Causal(), cache, execution)
        return select_absorbed(operand(self.latent_rank), operand(self.rope_size), Causal(), cache, execution)


class MLA(nn.Module):
    """c = norm(W_dkv x), k_rope = rope(W_kr x); a head's key is [W_uk c; k_rope], its value W_uv c; then attention.

    Reads the cache, returns the output and the cache update.
    """

    config: MLAConfig
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
    ) -> tuple[Float[Array, "B T D"], LatentUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))

        def project(name: str, inputs: Float[Array, "B T _"]) -> Float[Array, "B T _"]:
            return linear(inputs, weight[name], weight.get(f"{name}_bias"))

        rotated = config.rope.rotation(position, row_length)
        if config.query_rank is None:
            flat = project("query", inputs)
        else:
            compressed = config.norm.module(config.query_rank, "R", name="query_norm")(project("query_down", inputs))
            flat = project("query_up", compressed)
        query = flat.reshape(*inputs.shape[:2], config.num_heads, -1)
        query_nope = query[..., : config.nope_size]
        query_rope = rotated(query[..., config.nope_size :])

        down = project("latent_down", inputs)
        latent = config.norm.module(config.latent_rank, "R", name="latent_norm")(down[..., : config.latent_rank])
        shared_key = down[:, :, None, config.latent_rank :]
        rope_key = rotated(shared_key)[:, :, 0]
        update = LatentUpdate(latent, rope_key)

        key_up, value_up = weight["key_up"], weight["value_up"]
        options = {"scale": config.scale, "execution": self.execution}
        if committed(cache) is None or inputs.shape[1] > config.most_absorbed_tokens:
            query = jnp.concatenate([query_nope, query_rope], axis=3)
            expand = Expansion(key_up, value_up, config.num_heads)
            mixed = attend_expanded(query, update, expand, position, mask, cache, **options)
        else:
            by_head = (config.num_heads, -1, config.latent_rank)
            query_latent = jnp.einsum("btni,nir->btnr", query_nope, key_up.reshape(by_head))
            mixed = attend_absorbed(query_latent, query_rope, update, position, mask, cache, **options)
            mixed = jnp.einsum("btnr,njr->btnj", mixed, value_up.reshape(by_head))
        flat = mixed.reshape(*inputs.shape[:2], -1)
        out, bias = weight["out"], weight.get("out_bias")
        return row_parallel_linear(flat, out, bias, axis_name="N", execution=self.execution), update
