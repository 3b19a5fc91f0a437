"""Computes latent attention on keys and values made from the latents: for prompts, where many queries share them.

For every head the key of a token is [W_uk c; rope key] and its value W_uv c (DeepSeek-V2, arXiv 2405.04434). A pair of
a query and a token then costs I + H + J numbers per head (the sizes of a query without and with position, and of a
value) and not the 2 R + H of attention on the latents; making the keys and values of a token costs R (I + J).

Keys and values of cached tokens are made block by block and never kept: a whole cache of them would be larger than the
one that latent attention saves, 40,960 numbers a token and not 576 in DeepSeek-V3.
"""

from jaxtyping import Array, Float, Int

from decodax.layers.attention import expanded_over_devices as over_devices
from decodax.layers.attention.expansion import Expansion
from decodax.layers.attention.implementations import AttentionImplementation, attention_by
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.latent import LatentUpdate
from decodax.layers.kv_cache.view import CacheView

IMPLEMENTATIONS = {
    "split tokens": AttentionImplementation(
        over_devices.tokens_unsupported_reason, over_devices.attend_over_tokens, needs_mesh=True
    ),
    "split slots": AttentionImplementation(
        over_devices.slots_unsupported_reason, over_devices.attend_over_slots, needs_mesh=True
    ),
    **over_devices.ON_ONE_DEVICE,
}


def attend_expanded(
    query: Float[Array, "B T N I_plus_H"],
    update: LatentUpdate,
    expand: Expansion,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N J"]:
    """The attention output of each query, over cached and new tokens.

    query: per head without position, then with.
    update: latents and rope keys of the T new tokens.
    expand: makes keys and values.
    position: of the new tokens.
    mask: which tokens a query attends to; every query must attend to itself.
    cache: latents of earlier tokens. Tokens staged with it are new ones that come before those of this forward.
    scale: of the scores.
    execution: which kernels run, over which devices.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    operands = (query, update, expand.key_up, expand.value_up, position, mask, cache)
    return attention_by(IMPLEMENTATIONS, operands, execution, scale=scale)(*operands)[0]
