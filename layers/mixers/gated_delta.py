"""Implements the gated delta rule of Qwen3-Next and Qwen3.5: a state per head that replaces the value of a token's key.

Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464.

    u_t = beta_t (v_t - k_t a_t S_{t-1})        S_t = a_t S_{t-1} + k_t^T u_t
    out(norm(scale q_t S_t) * silu(z_t))        a_t = exp(-exp(decay_rate) softplus(x_a + decay_bias))

Queries, keys and values first pass a causal convolution over the last W tokens, channel by channel, and an activation;
queries and keys are then scaled to length 1. As in Qwen3-Next, a key head serves several consecutive value heads, the
norm is one RMSNorm for all heads over each head's channels, and decay and beta are one number per value head.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.predecessors import predecessors
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import ACTIVATIONS
from decodax.layers.kv_cache.recurrent import RecurrentUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._recurrent import RecurrentConfig
from decodax.layers.norm import Norm
from decodax.layers.recurrence.block import past_of
from decodax.layers.recurrence.delta import delta_recurrence
from decodax.layers.row_parallel import row_parallel_linear

_CONVOLVED = ("query", "key", "value")
LENGTH_EPS = 1e-6  # added to the squared length of queries and keys


@dataclass(frozen=True)
class GatedDeltaConfig(RecurrentConfig):
    """The config of a gated delta rule layer, with a state per value head.

    num_key_heads: K.
    num_value_heads: N = K G.
    key_size: channels of a key.
    value_size: channels of a value.
    convolution_width: W, tokens that the convolution reads, its own included.
    activation: after the convolution, a name of ACTIVATIONS.
    scale: multiplies query x key.
    norm: of the output.
    """

    num_key_heads: int
    num_value_heads: int
    key_size: int
    value_size: int
    convolution_width: int
    activation: str
    scale: float
    norm: Norm

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                "num_value_heads must be a multiple of num_key_heads, got "
                f"{self.num_value_heads} and {self.num_key_heads}"
            )
        if self.convolution_width < 2:
            raise ValueError(f"convolution_width must be at least 2 tokens, got {self.convolution_width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def num_columns(self) -> int:
        """Channels that are convolved: all heads' queries, then keys, then values."""
        return 2 * self.num_key_heads * self.key_size + self.num_value_heads * self.value_size

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """Value heads are in the order of the key heads that serve them, G for each."""
        values, width = self.num_value_heads * self.value_size, self.convolution_width
        keys = Weight(("KH", "D"), (self.num_key_heads * self.key_size, hidden_size), block_size=self.key_size)
        wide = Weight(("NH", "D"), (values, hidden_size), block_size=self.value_size)
        per_head = Weight(("N", "D"), (self.num_value_heads, hidden_size))
        key_convolution = Weight(("H", "W"), (keys.shape[0], width))
        return {
            **{"query": keys, "key": keys, "value": wide, "gate": wide, "beta": per_head, "decay": per_head},
            "query_convolution": key_convolution,
            "key_convolution": key_convolution,
            "value_convolution": Weight(("H", "W"), (values, width)),
            "decay_rate": Weight(("N",), (self.num_value_heads,), "zeros", dtype="float32"),
            "decay_bias": Weight(("N",), (self.num_value_heads,), "ones", dtype="float32"),
            "norm": self.norm.weights(self.value_size, "H"),
            "out": Weight(("D", "NH"), (hidden_size, values), block_size=self.value_size),
        }

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return GatedDelta(self, hidden_size, execution, name=name)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_value_heads, self.key_size, self.value_size

    @property
    def tail_shape(self) -> tuple[int, int]:
        return self.convolution_width - 1, self.num_columns


class GatedDelta(nn.Module):
    """out(norm(gated delta rule) * silu(z)); positions only from decay and convolution."""

    config: GatedDeltaConfig
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
    ) -> tuple[Float[Array, "B T D"], RecurrentUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))
        inputs = self.execution.gathered_tokens(inputs)
        past = past_of(cache, config.empty_cache(inputs.shape[0], 0, inputs.dtype))

        def project(name: str) -> Float[Array, "B T _"]:
            return self.execution.gathered_tokens(linear(inputs, weight[name]))

        # On a mesh every device convolves all channels, as the cache holds those of a token as one row.
        flat = [self.execution.split(project(name), "B _ _") for name in _CONVOLVED]
        columns = self.execution.split(jnp.concatenate(flat, axis=2), "B _ _")
        gate = project("gate").reshape(*inputs.shape[:2], config.num_value_heads, config.value_size)
        beta, log_decay = _beta_and_decay(project("beta"), project("decay"), weight)

        assert past.cache.tail is not None
        window = predecessors(columns, position, mask, past.cache.tail, past.columns)
        keys = config.num_key_heads * config.key_size
        by_kind = (
            self.execution.split(_convolved(config, taps, weight[f"{name}_convolution"]), "B _ _")
            for name, taps in zip(_CONVOLVED, jnp.split(window, (keys, 2 * keys), axis=3), strict=True)
        )
        query, key, value = (self.execution.split(heads, "B _ N _") for heads in _heads(config, *by_kind))
        read, corrected = delta_recurrence(query, key, value, log_decay, beta, position, mask, past, scale=config.scale)
        read, corrected = (self.execution.gathered_tokens(heads) for heads in (read, corrected))
        normed = config.norm.module(config.value_size, "H", name="norm")(read)
        gated = normed.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        flat = gated.astype(inputs.dtype).reshape(*inputs.shape[:2], -1)
        output = row_parallel_linear(flat, weight["out"], axis_name="N", execution=self.execution)
        return output, RecurrentUpdate(key, corrected, log_decay, columns)


def _convolved(
    config: GatedDeltaConfig, taps: Float[Array, "B T W I"], convolution: Float[Array, "I W"]
) -> Float[Array, "B T I"]:
    summed = jnp.einsum("btwc,cw->btc", taps, convolution, preferred_element_type=jnp.float32)
    return ACTIVATIONS[config.activation](summed).astype(taps.dtype)


def _beta_and_decay(
    beta: Float[Array, "B T N"], decay: Float[Array, "B T N"], weight: dict[str, Array]
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N 1"]]:
    beta, decay = beta.astype(jnp.float32), decay.astype(jnp.float32)
    rate = jnp.exp(weight["decay_rate"].astype(jnp.float32))[None, None]
    bias = weight["decay_bias"].astype(jnp.float32)[None, None]
    return jax.nn.sigmoid(beta), (-rate * jax.nn.softplus(decay + bias))[..., None]


def _heads(
    config: GatedDeltaConfig,
    query: Float[Array, "B T KH"],
    key: Float[Array, "B T KH"],
    value: Float[Array, "B T NI"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N I"]]:
    """Queries and keys of length 1, repeated for the value heads that they serve, and values."""
    tokens, group = value.shape[:2], config.num_value_heads // config.num_key_heads

    def directions(flat: Array) -> Array:
        heads = flat.reshape(*tokens, config.num_key_heads, config.key_size).astype(jnp.float32)
        length = jax.lax.rsqrt(jnp.sum(jnp.square(heads), axis=3, keepdims=True) + LENGTH_EPS)
        return jnp.repeat((heads * length).astype(flat.dtype), group, axis=2)

    value = value.reshape(*tokens, config.num_value_heads, config.value_size)
    return directions(query), directions(key), value
