"""Defines the transformer as linen modules: embedding, a stack of blocks, and the head.

All state is passed in and returned. One method serves prefill, decoding, chains and token trees: it runs a range of
layers over T tokens per row, reads the cache, and returns each layer's cache update.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import fetch
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.norm import Norm
from decodax.models.config import BlockConfig, ModelConfig, Residual, SubLayer


class Forward(NamedTuple):
    """The result of a run over a range of layers.

    hidden: Float[B, T, D], the residual stream after the last layer of the range, before any final norm.
    cache_updates: one entry per layer of the range, what its cache's `commit` takes.
    captured: {i: Float[B, T, D]}, the residual stream after i layers (0: the embeddings) for each i asked for.
    routes: one entry per layer of the range, the experts of its tokens (`layers/moe/routes.py`); None without experts.

    In pipeline stages cache_updates has one entry per place (`models/pipelined.py`), and routes none.
    """

    hidden: Float[Array, "B T D"]
    cache_updates: tuple[Any, ...]
    captured: dict[int, Float[Array, "B T D"]]
    routes: tuple[Any, ...] = ()


class Block(nn.Module):
    """A mixer sub-layer, then a feed-forward sub-layer (`BlockConfig`); each has its name in a profile."""

    config: BlockConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, hidden, position, row_length, cache, mask):
        size, gathered = self.hidden_size, self.execution.sequence_gathered

        def norm(name: str, config: Norm | None, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return inputs if config is None else config.module(size, name=name)(inputs)

        def sub_layer(name: str, config: SubLayer, hidden: Array, *context: Any) -> tuple[Array, Any]:
            """The sum, and what the layer gives besides."""
            layer = config.layer.module(size, name, self.execution)
            normed = norm(f"{name}_norm", config.norm, hidden)
            added, besides = layer(gathered(normed), *context)
            added = norm(f"{name}_post_norm", config.post_norm, added)
            return _sum(config.residual, hidden, normed, added), besides

        hidden, cache_update = sub_layer("mixer", self.config.mixer, hidden, position, row_length, cache, mask)
        hidden, routes = sub_layer("feed_forward", self.config.feed_forward, hidden)
        return hidden, cache_update, routes


def _sum(residual: Residual, hidden: Array, normed: Array, added: Array) -> Array:
    kept = normed if residual.after_norm else hidden
    keep, add = (jnp.asarray(factor, hidden.dtype) for factor in (residual.keep, residual.add))
    kept = kept if residual.keep == 1 else kept * keep
    return kept + (added if residual.add == 1 else added * add)


class Transformer(nn.Module):
    """`embed`, `run` over a range of layers, `logits`; calling the module runs all three, to initialise it."""

    config: ModelConfig
    execution: Execution = ON_THIS_DEVICE

    def setup(self) -> None:
        config = self.config
        described, padded = config.weights(), self.execution.padded
        self.embedding = fetch(self, "embedding", described["embedding"], padded)
        self.blocks = [Block(block, config.hidden_size, self.execution) for block in config.blocks]
        self.final_norm = config.final_norm.module(config.hidden_size)
        self.head = self.embedding if config.tie_embeddings else fetch(self, "head", described["head"], padded)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        hidden = self.embedding[tokens]
        return hidden * jnp.asarray(self.config.embedding_scale, hidden.dtype)

    def run(
        self,
        hidden: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        row_length: Int[Array, "B T"],
        caches: tuple[Any, ...] | None,
        mask: Mask,
        layers: tuple[int, int],
        capture: tuple[int, ...],
    ) -> Forward:
        hidden = self.execution.sharded_by_token(hidden)
        captured = {layers[0]: hidden} if layers[0] in capture else {}
        cache_updates, routes = [], []
        hidden = self.execution.sequence_sharded(hidden)
        for index in range(*layers):
            cache = None if caches is None else caches[index]
            hidden, update, new_routes = self.blocks[index](hidden, position, row_length, cache, mask)
            hidden = self.execution.sharded_by_token(hidden)
            cache_updates.append(update)
            routes.append(new_routes)
            if index + 1 in capture:
                captured[index + 1] = hidden
        return Forward(self.execution.sequence_gathered(hidden), tuple(cache_updates), captured, tuple(routes))

    def normed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.final_norm(hidden)

    def read_out(self, normed: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        with jax.named_scope("logits"):
            # The padding of the vocabulary on a mesh is cut off; each device keeps its shard, so nothing is moved.
            logits = linear(normed, self.head, output_dtype=jnp.float32)[..., : self.config.vocab_size]
            logits = logits if self.config.logit_scale == 1 else logits * self.config.logit_scale
            cap = self.config.logit_softcap
            return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.read_out(self.normed(hidden))

    def __call__(self, tokens, position, row_length, mask):
        layers = (0, self.config.num_layers)
        return self.logits(self.run(self.embed(tokens), position, row_length, None, mask, layers, ()).hidden)
