"""A model as pure functions of its parameters: what researchers call, jit, shard and change.

    forward = model.apply(params, tokens, position, caches)
    logits = model.logits(params, forward.hidden)
    caches = commit(caches, forward.rows, count)

`Model` holds nothing but its config, so it is hashable and can be a static argument of `jax.jit`.

On a mesh with a pipeline axis the parameters, caches and rows of layers at the same place of different stages stand
together, in one entry (`layers/kv_cache/stacked.py`, `models/pipelined.py`); whoever passes them on need not know.
"""

from collections.abc import Callable
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
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.weight import Weight
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.invariant import logits_in_tiles, run_in_tiles
from decodax.models.pipelined import Rows, run_in_stages
from decodax.models.transformer import Block, Forward, Transformer
from decodax.sharding.pipeline import Stages, find_stages
from decodax.sharding.rules import cut
from decodax.sharding.rules import place as place_on_mesh
from decodax.sharding.stacks import stack_params, stack_weights, unstack_params

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

    @property
    def vocab_size(self) -> int:
        """How many tokens `logits` has a value for."""
        return self.config.vocab_size

    @property
    def stages(self) -> Stages | None:
        """Which layers run where, on a mesh with a pipeline axis; None without.

        Raises ValueError, saying which, when layers do not divide into stages or differ between them.
        """
        num_stages = self.execution.num_parts("L")
        return None if num_stages == 1 else find_stages(self.config.blocks, num_stages, self.execution.pipeline)

    def weights(self) -> dict[str, Any]:
        """Descriptions of all parameters as this model takes them: those of stages stacked, and padded for the mesh."""
        return self._mapped(self.execution.padded, self._stacked_weights())

    def _stacked_weights(self) -> dict[str, Any]:
        """The same without what pads them."""
        weights, stages = self.config.weights(), self.stages
        return weights if stages is None else stack_weights(weights, stages)

    def _mapped(self, function: Callable[..., Any], weights: Params, *params: Params) -> Params:
        """`function` of each description, and of what stands at its place in `params`.

        Parameters that no description knows (of a strategy, beside the model's own) stay as they are.
        """
        mapped = dict(params[0]) if params else {}
        for name, weight in weights.items():
            own = [tree[name] for tree in params]
            mapped[name] = (
                function(weight, *own) if isinstance(weight, Weight) else self._mapped(function, weight, *own)
            )
        return mapped

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters: matrices scaled by the square root of their inputs, norms neutral."""
        token = jnp.zeros((1, 1), jnp.int32)
        plain = Transformer(self.config, Execution("xla"))  # of which only the parameters' shapes count
        params = jax.jit(plain.init)(key, token, token, token + 1, Causal())["params"]
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return self.stacked(params)

    def stacked(self, params: Params) -> Params:
        """Parameters with one subtree per layer, as this model takes them: stacked for pipeline stages, and padded."""
        if self.execution.mesh is None:
            return params
        params = params if self.stages is None else stack_params(params, self.stages)
        return self._mapped(self._held, self.weights(), params)

    def _held(self, weight: Weight, leaf: Array) -> Array:
        mesh, rules = self.execution.mesh, self.execution.rules
        return (
            leaf if mesh is None or leaf.shape == weight.shape else place_on_mesh(mesh, rules, leaf, weight, "a weight")
        )

    def unstacked(self, params: Params) -> Params:
        """The other way round: this model's parameters with one subtree per layer, of the sizes of its config."""
        if self.execution.mesh is None:
            return params
        params = self._mapped(lambda weight, leaf: cut(leaf, weight.shape), self._stacked_weights(), params)
        return params if self.stages is None else unstack_params(params, self.stages)

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> tuple[Any, ...]:
        """One empty cache per layer, for `capacity` tokens in each of `batch_size` rows, as `policy` keeps them."""
        return self._per_entry(lambda block: block.mixer.empty_cache(batch_size, capacity, dtype, policy))

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> tuple[Any, ...]:
        """Room for every layer's rows of `num_tokens` tokens that are to be staged (`layers/kv_cache/staged.py`)."""
        return self._per_entry(lambda block: block.mixer.empty_rows(batch_size, num_tokens, dtype))

    def _per_entry(self, make: Callable[[BlockConfig], Any]) -> tuple[Any, ...]:
        """What every layer has, those at the same place of different stages together."""
        stages, blocks = self.stages, self.config.blocks
        if stages is None:
            return tuple(map(make, blocks))

        def entry(place: int) -> Any:
            one = make(blocks[stages.layers(place)[0]])
            if place not in stages.stacks:
                return one
            return Stacked(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (stages.stack_size, *leaf.shape)), one))

        return tuple(map(entry, range(stages.num_places)))

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
        caches: those of the whole model (`empty_cache`); None means that nothing precedes these tokens.
        mask: who among the new tokens reads whom; `Causal()` (a chain) by default, `Ancestors` for a tree.
            With staged caches (`layers/kv_cache/staged.py`) the staged tokens count as new, in front of these.
        row_length: tokens in the row as far as position scaling is concerned; position + 1 by default, and the
            length of the whole prompt while it is prefilled (only dynamic and longrope scaling read it).
        layers: (a, b), all by default. capture: after how many layers to keep the hidden states.

        Raises NotImplementedError in pipeline stages for a part of the layers, or hidden states between them.
        """
        first, last = layers or (0, self.config.num_layers)
        if not 0 <= first <= last <= self.config.num_layers:
            raise ValueError(f"layers must be a range within 0..{self.config.num_layers}, got {(first, last)}")
        if any(not first <= index <= last for index in capture):
            raise ValueError(f"capture must lie in {first}..{last} (layers run before it), got {capture}")
        stages = self.stages
        num_entries = self.config.num_layers if stages is None else stages.num_places
        if caches is not None and len(caches) != num_entries:
            raise ValueError(f"caches must have the {num_entries} entries of `empty_cache`, got {len(caches)}")
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        if self.invariant and stages is not None:
            raise NotImplementedError("the invariant mode does not run in pipeline stages: use a mesh without pipeline")
        if self.invariant:
            return self._apply_in_tiles(params, inputs, position, row_length, caches, mask, (first, last), capture)
        hidden = self.embed(params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        if stages is not None:
            self._check_whole((first, last), capture)
            return self._apply_in_stages(params, hidden, Rows(position, row_length, mask), caches, stages, capture)
        return self._run(params, "run", hidden, position, row_length, caches, mask, (first, last), capture)

    def _check_whole(self, layers: tuple[int, int], capture: tuple[int, ...]) -> None:
        """Raises NotImplementedError for what a run in stages has no place for."""
        ends = (0, self.config.num_layers)
        if layers != ends or not set(capture) <= set(ends):
            raise NotImplementedError(
                f"a model in pipeline stages runs all its {ends[1]} layers at once, and gives hidden states before and "
                f"after them only; asked for layers {layers[0]} to {layers[1]} and hidden states after {capture}. "
                "Split the model over the mesh axes tensor, expert or data for methods that run or read a part of "
                "the layers"
            )

    def _apply_in_stages(self, params, hidden, rows: Rows, caches, stages: Stages, capture) -> Forward:
        """`apply` on a mesh with a pipeline axis: the layers before the stages, the stages, the layers after them."""
        blocks, size = self.config.blocks, self.config.hidden_size
        caches = (None,) * stages.num_places if caches is None else caches
        captured = {0: hidden} if 0 in capture else {}

        def run_layer(place: int, weights: Any, hidden: Array, rows: Rows, cache: Any) -> tuple[Array, Any]:
            block = Block(blocks[stages.layers(place)[0]], size, self.execution)
            with jax.named_scope(f"blocks_{place}"):
                return block.apply({"params": weights}, hidden, *rows[:2], cache, rows.mask)[:2]

        def run_on_all(places: range, hidden: Array) -> tuple[Array, tuple[Any, ...]]:
            new = []
            for place in places:
                hidden, added = run_layer(place, params[f"blocks_{place}"], hidden, rows, caches[place])
                new.append(added)
            return hidden, tuple(new)

        own = stages.stacks
        hidden, before = run_on_all(range(stages.before), hidden)
        weights = tuple(params[f"blocks_{place}"] for place in own)
        held = caches[own.start : own.stop]
        hidden, inside = run_in_stages(run_layer, stages, self.execution, weights, hidden, rows, held)
        hidden, after = run_on_all(range(own.stop, stages.num_places), hidden)
        if self.config.num_layers in capture:
            captured[self.config.num_layers] = hidden
        return Forward(hidden, (*before, *inside, *after), captured)

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
