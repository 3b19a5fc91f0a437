"""A short way from some layer of a model to its head: one attention layer and two norms, trained for it.

Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911. The feed-forward, most of a
layer's weights, is what it leaves out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.mixers._contract import Mixer
from decodax.layers.norm import RMSNorm, RMSNormConfig
from decodax.layers.weight import Weight

Params = dict[str, Any]


@dataclass(frozen=True)
class AttentionExit:
    """final_norm(hidden + mixer(mixer_norm(hidden))): what the head reads in place of the last layer's normed output.

    Its parameters are {"mixer", "mixer_norm", "final_norm"}. It has a cache of its own, of one layer.
    """

    mixer: Mixer
    mixer_norm: RMSNormConfig
    final_norm: RMSNormConfig
    hidden_size: int
    execution: Execution = ON_THIS_DEVICE

    def weights(self) -> dict[str, Any]:
        """Descriptions of the weights, nested like the parameters."""
        size = self.hidden_size
        norms = {"mixer_norm": self.mixer_norm.weights(size), "final_norm": self.final_norm.weights(size)}
        return {"mixer": self.mixer.weights(size), **norms}

    def check(self, params: Any) -> None:
        """Raises ValueError when these are not the parameters of this adapter."""
        wanted, found = _shapes(self.weights()), _shapes(params)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"the adapter's weight {name} must have shape {wanted.get(name, 'none')}, got "
                    f"{found.get(name, 'none')}: use an adapter that was trained for this model and exit layer"
                )

    def apply(
        self,
        params: Params,
        hidden: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: Any = None,
        *,
        mask: Mask | None = None,
        row_length: Int[Array, "B #T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """What the head reads for T new tokens per row, and the rows for the adapter's cache; like `Model.apply`."""
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        return _Module(self).apply({"params": params}, hidden, position, row_length, cache, mask)

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike) -> Any:
        return self.mixer.empty_cache(batch_size, capacity, dtype)

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        return self.mixer.empty_rows(batch_size, num_tokens, dtype)


class _Module(nn.Module):
    config: AttentionExit

    @nn.compact
    def __call__(self, hidden, position, row_length, cache, mask):
        config, size = self.config, self.config.hidden_size
        with jax.named_scope("exit_adapter"):
            normed = RMSNorm(config.mixer_norm, size, name="mixer_norm")(hidden)
            mixer = config.mixer.module(size, "mixer", config.execution)
            added, rows = mixer(normed, position, row_length, cache, mask)
            return RMSNorm(config.final_norm, size, name="final_norm")(hidden + added), rows


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its path."""
    if isinstance(tree, Mapping):
        inner = {name: _shapes(part) for name, part in tree.items()}
        return {f"{name}.{path}".rstrip("."): shape for name, part in inner.items() for path, shape in part.items()}
    return {"": tuple(tree.shape)} if isinstance(tree, Weight) or hasattr(tree, "shape") else {}
