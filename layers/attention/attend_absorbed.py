"""Latent attention on the latents themselves, for few new tokens: a decoding step, a chain of drafts, a token tree.

A head's key is W_uk c and its value W_uv c, for the latent c of a token (DeepSeek-V2, arXiv 2405.04434, section 2.1).
With W_uk multiplied into the query, and W_uv into what comes out, all heads read the latents as one key-value head:
score = (query_latent . latent + query_rope . rope_key) scale, output = the mixture of latents.

`mla_decode` does this where it takes the operands; it reads every latent once. Everywhere else plain JAX does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.choice import Choice, backend_of_this_device, choose
from decodax.kernels_pallas.mla_decode import MAX_QUERIES, NewLatents, choose_mla_decode, mla_decode
from decodax.kernels_pallas.new_tokens import MAX_NEW_TOKENS
from decodax.layers.attention.attend import attend
from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.latent import LatentCache, LatentRows
from decodax.layers.kv_cache.staged import Staged

IN_XLA = Execution("xla")


def attend_absorbed(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    rows: LatentRows,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: LatentCache | Staged,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N R"]:
    """Each query's mixture of the latents it may read, cached and new (`rows`); every query may read itself.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    choice = choose_absorbed(query_latent, query_rope, mask, cache, execution)

    def in_xla(query_latent, query_rope, rows, position, mask, cache) -> Array:
        query = jnp.concatenate([query_latent, query_rope], axis=3)
        tokens = _as_one_head(rows)
        if isinstance(cache, Staged):
            staged = _KeysAndValues(*(_as_one_head(cache.rows),) * 2)
            cache = Staged(cache.cache, staged, cache.position)
        output = attend(query, tokens, tokens, position, mask, cache, scale=scale, softcap=None, execution=IN_XLA)
        return output[..., : query_latent.shape[3]]

    operands = (query_latent, query_rope, rows, position, mask, cache)
    if choice.backend == "xla":
        return in_xla(*operands)

    def in_kernels(*operands: Any) -> Array:
        return _in_kernels(*operands, scale=scale, choice=choice, execution=execution)

    return with_gradients_of(in_xla, in_kernels)(*operands)
