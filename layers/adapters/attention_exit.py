"""Implements the early-exit adapter of Kangaroo: one trained attention layer and two norms before the head.

Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911. It has no
feed-forward, which is most of a layer's weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.mixers.contract import Mixer
from decodax.layers.norm import Norm

Params = dict[str, Any]


@dataclass(frozen=True)
class AttentionExit:
    """final_norm(hidden + mixer(mixer_norm(hidden))): the head's input, in place of the last layer's normed output.

    Its parameters are {"mixer", "mixer_norm", "final_norm"}. It has its own cache, of one layer.

    mixer: the attention layer.
    mixer_norm: before it.
    final_norm: before the head.
    hidden_size: D.
    execution: how the layers run.
    """

    mixer: Mixer
    mixer_norm: Norm
    final_norm: Norm
    hidden_size: int
    execution: Execution = ON_THIS_DEVICE

    def weights(self) -> dict[str, Any]:
        """Descriptions of the weights, nested like the parameters."""
        size = self.hidden_size
        norms = {"mixer_norm": self.mixer_norm.weights(size), "final_norm": self.final_norm.weights(size)}
        return {"mixer": self.mixer.weights(size), **norms}

    def check(self, params: Any) -> None:
        """Raises ValueError when these are not the parameters of this adapter."""
        expected, found = _shapes(self.weights()), _shapes(params)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"the adapter's weight {name} must have shape {expected.get(name, 'none')}, got "
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
        """The head's input for T new tokens per row, and the adapter's cache update.

        params, position, cache, mask, row_length: as in `Model.apply`.
        hidden: output of the exit layer.
        """
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        return _Module(self).apply({"params": params}, hidden, position, row_length, cache, mask)

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike) -> Any:
        return self.mixer.empty_cache(batch_size, capacity, dtype)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        return self.mixer.empty_update(batch_size, num_tokens, dtype)


class _Module(nn.Module):
    config: AttentionExit

    @nn.compact
    def __call__(self, hidden, position, row_length, cache, mask):
        config, size = self.config, self.config.hidden_size
        with jax.named_scope("exit_adapter"):
            normed = config.mixer_norm.module(size, name="mixer_norm")(hidden)
            mixer = config.mixer.module(size, "mixer", config.execution)
            added, update = mixer(normed, position, row_length, cache, mask)
            return config.final_norm.module(size, name="final_norm")(hidden + added), update


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its path."""
    if isinstance(tree, Mapping):
        inner = {name: _shapes(subtree) for name, subtree in tree.items()}
        return {f"{name}.{path}".rstrip("."): shape for name, shapes in inner.items() for path, shape in shapes.items()}
    return {"": tuple(tree.shape)} if isinstance(tree, Weight) or hasattr(tree, "shape") else {}
