"""Defines the transformer as linen modules: embedding, a stack of blocks, and the head.

All state is passed in and returned. One method serves prefill, decoding, chains and token trees: it runs a range of
layers over T tokens per row, reads the cache, and returns each layer's cache update.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core.weight import fetch, fetch_own
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.norm import Norm
from decodax.models.config import BlockConfig, ModelConfig, SubLayer


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
    """A mixer sub-layer and a feed-forward sub-layer (`BlockConfig`); each has its name in a profile."""

    config: BlockConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, hidden, position, row_length, cache, mask):
        config = self.config
        normed = self._normed("mixer_norm", config.mixer.norm, hidden)
        added, cache_update = self._layer("mixer", config.mixer, normed, position, row_length, cache, mask)
        after, routes = self._sum("mixer", config.mixer, hidden, normed, added), None
        if config.feed_forward is not None:
            inputs = after if config.order == "serial" else hidden
            if config.order != "parallel, one norm":
                normed = self._normed("feed_forward_norm", config.feed_forward.norm, inputs)
            added, routes = self._layer("feed_forward", config.feed_forward, normed)
            after = self._sum("feed_forward", config.feed_forward, after, normed, added)
        if config.output_scale:
            scale = fetch(self, "output_scale", config.weights(self.hidden_size)["output_scale"])
            after = after * scale.astype(after.dtype)[None, None]
        return after, cache_update, routes

    def _layer(self, name: str, config: SubLayer, normed: Array, *context: Any) -> tuple[Array, Any]:
        """A layer's output, normed, and what it gives besides."""
        layer = config.layer.module(self.hidden_size, name, self.execution)
        output, besides = layer(self.execution.sequence_gathered(normed), *context)
        return self._normed(f"{name}_post_norm", config.post_norm, output), besides

    def _sum(self, name: str, config: SubLayer, hidden: Array, normed: Array, added: Array) -> Array:
        residual = config.residual
        kept = normed if residual.after_norm else hidden
        keep, add = (jnp.asarray(factor, hidden.dtype) for factor in (residual.keep, residual.add))
        kept = kept if residual.keep == 1 else kept * keep
        total = kept + (added if residual.add == 1 else added * add)
        return self._normed(f"{name}_sum_norm", config.sum_norm, total)

    def _normed(self, name: str, norm: Norm | None, inputs: Array) -> Array:
        return inputs if norm is None else norm.module(self.hidden_size, name=name)(inputs)


class Transformer(nn.Module):
    """`embed`, `run` over a range of layers, `logits`; calling the module runs all three, to initialise it."""

    config: ModelConfig
    execution: Execution = ON_THIS_DEVICE

    def setup(self) -> None:
        config = self.config
        self.around = fetch_own(self, config.weights(), self.execution.padded)
        self.blocks = [Block(block, config.hidden_size, self.execution) for block in config.blocks]
        for name, norm in (("embedding_norm", config.embedding.norm), ("final_norm", config.final_norm)):
            setattr(self, name, None if norm is None else norm.module(config.hidden_size))

    def embed(self, tokens: Int[Array, "B T"], position: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        hidden = self.config.embedding.embedded(self.around, tokens, position)
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)

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
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def read_out(self, normed: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        with jax.named_scope("logits"):
            return self.config.head.logits(self.around, normed, self.config.vocab_size)

    def token_logits(
        self, normed: Float[Array, "*batch D"], tokens: Int[Array, "*batch I"]
    ) -> Float32[Array, "*batch I"]:
        return self.config.head.token_logits(self.around, normed, tokens)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.read_out(self.normed(hidden))

    def __call__(self, tokens, position, row_length, mask):
        layers = (0, self.config.num_layers)
        return self.logits(self.run(self.embed(tokens, position), position, row_length, None, mask, layers, ()).hidden)
