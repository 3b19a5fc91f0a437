"""A model as pure functions of its parameters: what researchers call, jit, shard and change.

    forward = model.apply(params, tokens, position, caches)
    logits = model.logits(params, forward.hidden)
    caches = commit(caches, forward.rows, count)

`Model` holds nothing but its config, so it is hashable and can be a static argument of `jax.jit`.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.models.config import ModelConfig
from decodax.models.invariant import logits_in_tiles, run_in_tiles
from decodax.models.transformer import Forward, Transformer

Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The functions of one model; parameters are a nested dictionary of arrays, one subtree per layer.

    invariant: a token's hidden states, rows and logits are the same to the last bit whether it runs alone, after those
        before it were committed, or together with them, as a chain or a tree (`models/invariant.py`). Slower; needs
        the default cache policy, and no kernels.
    execution: which kernels run, and over which devices; changes no result but for rounding.
    """

    config: ModelConfig
    invariant: bool = False
    execution: Execution = ON_THIS_DEVICE

    @property
    def module(self) -> Transformer:
        """The linen module, for those who want to `init`, `apply` or `tabulate` it themselves."""
        # Which experts the others of a tile chose must not change a token's bits: each expert runs on all of it.
        execution = replace(self.execution, experts="dense") if self.invariant else self.execution
        return Transformer(self.config, execution)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters: matrices scaled by the square root of their inputs, norms neutral."""
        token = jnp.zeros((1, 1), jnp.int32)
        plain = Transformer(self.config, Execution("xla"))  # of which only the parameters' shapes count
        params = jax.jit(plain.init)(key, token, token, token + 1, Causal())["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> tuple[Any, ...]:
        """One empty cache per layer, for `capacity` tokens in each of `batch_size` rows, as `policy` keeps them."""
        return tuple(block.mixer.empty_cache(batch_size, capacity, dtype, policy) for block in self.config.blocks)

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> tuple[Any, ...]:
        """Room for every layer's rows of `num_tokens` tokens that are to be staged (`layers/kv_cache/staged.py`)."""
        return tuple(block.mixer.empty_rows(batch_size, num_tokens, dtype) for block in self.config.blocks)

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The input of the first layer for these tokens; mix in vectors of your own and pass it to `apply`."""
        return self._run(params, "embed", tokens)

    def apply(
        self,
        params: Params,
        inputs: Int[Array, "B T"] | Float[Array, "B T D"],
        position: Int[Array, "B T"],
        caches: tuple[Any, ...] | None = None,
        *,
        mask: Mask | None = None,
        row_length: Int[Array, "B #T"] | None = None,
        layers: tuple[int, int] | None = None,
        capture: tuple[int, ...] = (),
    ) -> Forward:
        """Runs layers a to b - 1 over T new tokens per row; reads the caches, writes nothing.

        inputs: token ids, or hidden states (embeddings, or what an earlier range of layers returned).
        position: absolute position of each token; for a tree, the row's length plus the node's depth.
        caches: one per layer of the whole model (`empty_cache`); None means that nothing precedes these tokens.
        mask: who among the new tokens reads whom; `Causal()` (a chain) by default, `Ancestors` for a tree.
            With staged caches (`layers/kv_cache/staged.py`) the staged tokens count as new, in front of these.
        row_length: tokens in the row as far as position scaling is concerned; position + 1 by default, and the
            length of the whole prompt while it is prefilled (only dynamic and longrope scaling read it).
        layers: (a, b), all by default. capture: after how many layers to keep the hidden states.
        """
        first, last = layers or (0, self.config.num_layers)
        if not 0 <= first <= last <= self.config.num_layers:
            raise ValueError(f"layers must be a range within 0..{self.config.num_layers}, got {(first, last)}")
        if any(not first <= index <= last for index in capture):
            raise ValueError(f"capture must lie in {first}..{last} (layers run before it), got {capture}")
        if caches is not None and len(caches) != self.config.num_layers:
            raise ValueError(f"caches must have one entry per layer ({self.config.num_layers}), got {len(caches)}")
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        if self.invariant:
            return self._apply_in_tiles(params, inputs, position, row_length, caches, mask, (first, last), capture)
        hidden = self.embed(params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        return self._run(params, "run", hidden, position, row_length, caches, mask, (first, last), capture)

    def _apply_in_tiles(self, params, inputs, position, row_length, caches, mask, layers, capture) -> Forward:
        """`apply` in the invariant mode; every layer's cache comes to it as a `Tile`."""
        first, last = layers
        is_token = jnp.issubdtype(inputs.dtype, jnp.integer)
        dtype = params["embedding"].dtype if is_token else inputs.dtype

        def run(inputs, position, row_length, tiles, mask) -> Forward:
            hidden = jax.lax.optimization_barrier(self.embed(params, inputs)) if is_token else inputs
            captured, rows = {first: hidden} if first in capture else {}, []
            for index, tile in enumerate(tiles, start=first):
                one_layer = (index, index + 1)
                reads = (None,) * index + (tile,)
                out = self._run(params, "run", hidden, position, row_length, reads, mask, one_layer, ())
                # The barrier makes a layer the same computation whatever range of layers it is run in.
                hidden = jax.lax.optimization_barrier(out.hidden)
                rows.extend(out.rows)
                if index + 1 in capture:
                    captured[index + 1] = hidden
            return Forward(hidden, tuple(rows), captured)

        def empty_rows(num_tokens: int) -> tuple[Any, ...]:
            return self.empty_rows(inputs.shape[0], num_tokens, dtype)[first:last]

        caches = (None,) * (last - first) if caches is None else caches[first:last]
        return run_in_tiles(run, inputs, position, row_length, caches, mask, empty_rows)

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32: final norm, head, soft-cap. Works on the hidden states of any layer."""
        if self.invariant:
            return logits_in_tiles(lambda tile: self._run(params, "logits", tile), hidden)
        return self._run(params, "logits", hidden)

    def normed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm alone: what the head reads, and what heads trained beside it read."""
        return self._run(params, "normed", hidden)

    def read_out(self, params: Params, normed: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head and the soft-cap alone: logits in float32 of states that have been normed (`normed`)."""
        return self._run(params, "read_out", normed)

    def _run(self, params: Params, method: str, *arguments: Any) -> Any:
        return self.module.apply({"params": params}, *arguments, method=method)


def commit(
    caches: tuple[Any, ...], rows: tuple[Any, ...], count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
) -> tuple[Any, ...]:
    """Writes the accepted rows of every layer: the first `count[b]` tokens of row b, or those of `path[b]`."""
    return tuple(cache.commit(new, count, path) for cache, new in zip(caches, rows, strict=True))
