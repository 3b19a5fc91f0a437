"""Computes attention on keys and values made from latents in plain JAX, with any cache of latents and any mask."""

from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.padding import padded
from decodax.layers.attention.attend_absorbed import attend_in_blocks
from decodax.layers.attention.expansion import ExpandedCache, Expansion
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVUpdate
from decodax.layers.kv_cache.latent import LatentUpdate
from decodax.layers.kv_cache.view import CacheView, part


def attend_expanded_in_xla(
    query: Float[Array, "B T N I_plus_H"],
    update: LatentUpdate,
    key_up: Float[Array, "NI R"],
    value_up: Float[Array, "NJ R"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    execution: Execution,
) -> tuple[Float[Array, "B T N J"], Float32[Array, "B T N"]]:
    """The operands are those of `attend_expanded`; `update` may hold no tokens, and then only the cache is read."""
    expand, value_size = Expansion(key_up, value_up, query.shape[2]), value_up.shape[0] // query.shape[2]

    def heads(update: LatentUpdate) -> KVUpdate:
        latent, rope_key = (tokens.astype(query.dtype) for tokens in (update.latent, update.rope_key))
        return KVUpdate(*expand.of_one_size(latent, rope_key))

    new = heads(update)
    expanded = part(cache, lambda latents: ExpandedCache(latents, expand), heads)
    query = padded(query, 3, new.key.shape[3])
    output, lse = attend_in_blocks(query, new, position, mask, expanded, scale=scale, execution=execution)
    return output[..., :value_size], lse
