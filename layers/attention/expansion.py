"""Makes the keys and values of all heads from latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

For every head the key of a token is [W_uk c; rope key] and its value W_uv c, for the latent c of the token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.core import pytree
from decodax.core.linear import linear
from decodax.kernels_pallas.padding import padded
from decodax.layers.kv_cache.latent import LatentCache
from decodax.layers.kv_cache.micro_batch import MicroBatchCache


@pytree.dataclass
class Expansion:
    """The weights that make keys and values.

    key_up: W_uk of all heads, one below the other.
    value_up: W_uv of all heads.
    num_heads: how many heads there are on this device.
    """

    key_up: Float[Array, "NI R"]
    value_up: Float[Array, "NJ R"]
    num_heads: int = pytree.static()

    def __call__(
        self, latent: Float[Array, "B S R"], rope_key: Float[Array, "B S H"]
    ) -> tuple[Float[Array, "B N S I_plus_H"], Float[Array, "B N S J"]]:
        """Keys and values of all heads."""

        def heads(weight: Array) -> Array:
            flat = linear(latent, weight)
            by_head = (self.num_heads, weight.shape[0] // self.num_heads)
            return jnp.moveaxis(flat.reshape(*latent.shape[:2], *by_head), 2, 1)

        shared = jnp.broadcast_to(rope_key[:, None], (latent.shape[0], self.num_heads, *rope_key.shape[1:]))
        return jnp.concatenate([heads(self.key_up), shared], axis=3), heads(self.value_up)

    def of_one_size(
        self, latent: Float[Array, "B S R"], rope_key: Float[Array, "B S H"]
    ) -> tuple[Float[Array, "B N S H_max"], Float[Array, "B N S H_max"]]:
        """Keys and values padded with zeros to the larger of their sizes: zeros add nothing to a score."""
        key, value = self(latent, rope_key)
        size = max(key.shape[3], value.shape[3])
        return padded(key, 3, size), padded(value, 3, size)


@pytree.dataclass
class ExpandedCache:
    """A cache of latents, read as the keys and values of all heads, which are of one size."""

    latents: LatentCache | MicroBatchCache
    expand: Expansion

    @property
    def length(self) -> Int[Array, " B"]:
        return self.latents.length

    @property
    def capacity(self) -> int:
        return self.latents.capacity

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B N S H"], Float[Array, "B N S H"], Int[Array, "1 S"], Bool[Array, "B 1 S"]]:
        latent, rope_key, position, filled = self.latents.read_latents(start, num_tokens)
        dtype = self.expand.key_up.dtype
        key, value = self.expand.of_one_size(latent.astype(dtype), rope_key.astype(dtype))
        return key, value, position, filled[:, None]
