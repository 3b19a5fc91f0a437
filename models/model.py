"""Defines `Model`, the pure functions of a language model: forward, logits, caches; to call, jit, shard and change.

    forward = model.apply(params, tokens, position, caches)
    logits = model.logits(params, forward.hidden)
    caches = commit(caches, forward.cache_updates, count)

`Model` holds nothing but its config, so it is hashable and can be a static argument of `jax.jit`.

On a mesh with a pipeline axis the parameters, caches and cache updates of layers at the same place of different stages
are stacked in one entry (`layers/kv_cache/stacked.py`, `models/pipelined.py`); code that passes them on need not know.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from decodax.core.arguments import require_methods
from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import CachePolicy, KeptCache
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.mixers.contract import Mixer
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.transformer import Forward, Transformer
from decodax.sharding.pipeline import Stages, find_stages
from decodax.sharding.rules import cut
from decodax.sharding.rules import place as place_on_mesh

Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The functions of one model; parameters are a nested dictionary of arrays, one subtree per layer.

    config: of the model.
    invariant: a token's hidden states, cache update and logits are the same to the last bit whether it runs alone,
        after those before it were committed, or together with them, as a chain or a tree (`models/invariant.py`).
        Slower; needs the default cache policy, and no kernels.
    execution: which kernels run, and over which devices; changes results by rounding only.
    """

    config: ModelConfig
    invariant: bool = False
    execution: Execution = ON_THIS_DEVICE

    def __post_init__(self) -> None:
        """Raises ValueError for a mixer that lacks a method, and for an invariant mode where a layer has none."""
        for mixer in dict.fromkeys(block.mixer.layer for block in self.config.blocks):
            require_methods(mixer, Mixer, "the mixer")
        reasons = [block.mixer.layer.invariant_unsupported_reason() for block in self.config.blocks if self.invariant]
        if found := sorted(set(filter(None, reasons))):
            raise ValueError(f"this model has no invariant mode: {', '.join(found)}: use invariant=False")

    @property
    def module(self) -> Transformer:
        """The linen module, to `init`, `apply` or `tabulate` it directly."""
        # The experts chosen by a tile's other tokens must not change a token's bits: each expert runs on the full tile.
        execution = replace(self.execution, experts="dense") if self.invariant else self.execution
        return Transformer(self.config, execution)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that `logits` has a value for."""
        return self.config.vocab_size

    def dtype(self, params: Params) -> jnp.dtype:
        """The dtype in which the model computes: that of its embedding. Single weights may have another."""
        return params["embedding"].dtype

    @property
    def stages(self) -> Stages | None:
        """The pipeline stages of the layers, on a mesh with a pipeline axis; None without.

        Raises ValueError, naming the layers, when they do not divide into stages or differ between them.
        """
        num_stages = self.execution.num_shards("L")
        return None if num_stages == 1 else find_stages(self.config.blocks, num_stages, self.execution.pipeline)

    def weights(self) -> dict[str, Any]:
        """Descriptions of all parameters in this model's form: stacked for pipeline stages, and padded for the mesh."""
        return self._mapped(self.execution.padded, self._stacked_weights())

    def _stacked_weights(self) -> dict[str, Any]:
        """`weights` without padding."""
        weights, stages = self.config.weights(), self.stages
        if stages is None:
            return weights
        from decodax.sharding.stacks import stack_weights

        return stack_weights(weights, stages)

    def _mapped(self, function: Callable[..., Any], weights: Params, *params: Params) -> Params:
        """Applies `function` to each description and the leaves at its path in `params`.

        Parameters without a description (a strategy's auxiliary weights beside the model's) stay as they are.
        """
        mapped = dict(params[0]) if params else {}
        for name, weight in weights.items():
            own = [tree[name] for tree in params]
            mapped[name] = (
                function(weight, *own) if isinstance(weight, Weight) else self._mapped(function, weight, *own)
            )
        return mapped

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters: matrices scaled by the square root of their inputs, neutral norms."""
        token = jnp.zeros((1, 1), jnp.int32)
        plain = Transformer(self.config, Execution("xla"))  # used for its parameters' shapes only
        params = jax.jit(plain.init)(key, token, token, token + 1, Causal())["params"]
        params = self._mapped(lambda weight, leaf: leaf.astype(weight.dtype_in(dtype)), self.config.weights(), params)
        return self.stacked(params)

    def stacked(self, params: Params) -> Params:
        """Converts parameters with one subtree per layer: stacks them for pipeline stages, and pads for the mesh."""
        if self.execution.mesh is None:
            return params
        if self.stages is not None:
            from decodax.sharding.stacks import stack_params

            params = stack_params(params, self.stages)
        return self._mapped(self._held, self.weights(), params)

    def _held(self, weight: Weight, leaf: Array) -> Array:
        mesh, rules = self.execution.mesh, self.execution.rules
        return (
            leaf if mesh is None or leaf.shape == weight.shape else place_on_mesh(mesh, rules, leaf, weight, "a weight")
        )

    def unstacked(self, params: Params) -> Params:
        """The inverse: this model's parameters with one subtree per layer, with the sizes of its config."""
        if self.execution.mesh is None:
            return params
        params = self._mapped(lambda weight, leaf: cut(leaf, weight.shape), self._stacked_weights(), params)
        if self.stages is None:
            return params
        from decodax.sharding.stacks import unstack_params

        return unstack_params(params, self.stages)

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> tuple[Any, ...]:
        """One empty cache per layer.

        batch_size: rows.
        capacity: tokens per row.
        dtype: of keys and values.
        policy: KV cache policy.
        Raises ValueError for a policy that no layer can honour.
        """
        reasons = [block.mixer.layer.unsupported_policy_reason(policy) for block in self.config.blocks]
        if None not in reasons:
            raise ValueError(
                f"cache_policy {getattr(policy, '__name__', type(policy).__name__)} would change no layer of this "
                f"model: {', '.join(sorted(set(filter(None, reasons))))}: leave it out"
            )
        caches = self._per_entry(lambda block: block.mixer.layer.empty_cache(batch_size, capacity, dtype, policy))
        for cache in caches:
            require_methods(cache, KeptCache, "the cache")
        return caches

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> tuple[Any, ...]:
        """An empty cache update per layer for `num_tokens` tokens to be staged (`layers/kv_cache/staged.py`)."""
        return self._per_entry(lambda block: block.mixer.layer.empty_update(batch_size, num_tokens, dtype))

    def _per_entry(self, make: Callable[[BlockConfig], Any]) -> tuple[Any, ...]:
        """One entry per layer, with layers at the same place of different stages stacked."""
        stages, blocks = self.stages, self.config.blocks
        if stages is None:
            return tuple(map(make, blocks))

        def entry(place: int) -> Any:
            one = make(blocks[stages.layers(place)[0]])
            if place not in stages.stacks:
                return one
            return Stacked(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (stages.stack_size, *leaf.shape)), one))

        return tuple(map(entry, range(stages.num_places)))

    def embed(self, params: Params, tokens: Int[Array, "B T"], position: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The input of the first layer for these tokens; mix in other vectors and pass it to `apply`."""
        return self.run_method(params, "embed", tokens, position)

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

        params: of the model.
        inputs: token ids, or hidden states (embeddings, or what an earlier range of layers returned).
        position: absolute position of each token: the number of tokens before it. For the nodes of a draft tree that is
            `state.length - 1` plus the node's depth, as the root is the row's last token.
        caches: those of the whole model (`empty_cache`); None means that nothing precedes these tokens.
        mask: which new tokens each query attends to; `Causal()` (a chain) by default, `Ancestors` for a tree.
            With staged caches (`layers/kv_cache/staged.py`) the staged tokens count as new, before these.
        row_length: tokens in the row, for position scaling; position + 1 by default, and the length of the full prompt
            during prefill (only dynamic and longrope scaling read it).
        layers: (a, b), all by default.
        capture: after how many layers to keep the hidden states.

        Raises NotImplementedError in pipeline stages for some of the layers, or hidden states between them.
        """
        first, last = layers or (0, self.config.num_layers)
        if not 0 <= first <= last <= self.config.num_layers:
            raise ValueError(f"layers must be a range within 0..{self.config.num_layers}, got {(first, last)}")
        if any(not first <= index <= last for index in capture):
            raise ValueError(f"capture must be in {first}..{last} (layers run before it), got {capture}")
        stages = self.stages
        num_entries = self.config.num_layers if stages is None else stages.num_places
        if caches is not None and len(caches) != num_entries:
            raise ValueError(f"caches must have the {num_entries} entries of `empty_cache`, got {len(caches)}")
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        if self.invariant and stages is not None:
            raise NotImplementedError("the invariant mode does not run in pipeline stages: use a mesh without pipeline")
        if self.invariant:
            from decodax.models.invariant import apply_in_tiles

            return apply_in_tiles(self, params, inputs, position, row_length, caches, mask, (first, last), capture)
        hidden = self.embed(params, inputs, position) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        if stages is not None:
            from decodax.models.pipelined import Rows, apply_in_stages

            rows = Rows(position, row_length, mask)
            return apply_in_stages(
                self.config, self.execution, stages, params, hidden, rows, caches, (first, last), capture
            )
        return self.run_method(params, "run", hidden, position, row_length, caches, mask, (first, last), capture)

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32: final norm, head, soft-cap. Takes the hidden states of any layer."""
        if self.invariant:
            from decodax.models.invariant import logits_in_tiles

            return logits_in_tiles(lambda tile: self.run_method(params, "logits", tile), hidden)
        return self.run_method(params, "logits", hidden)

    def normed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The final norm alone: the input of the head, and of heads trained beside it."""
        return self.run_method(params, "normed", hidden)

    def read_out(self, params: Params, normed: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head and the soft-cap alone: logits in float32 of normed states (`normed`)."""
        return self.run_method(params, "read_out", normed)

    def token_logits(
        self, params: Params, normed: Float[Array, "*batch D"], tokens: Int[Array, "*batch I"]
    ) -> Float32[Array, "*batch I"]:
        """`read_out` for some tokens each."""
        return self.run_method(params, "token_logits", normed, tokens)

    def run_method(self, params: Params, method: str, *arguments: Any) -> Any:
        """Runs a method of the linen module (`models/transformer.py`) with these parameters."""
        return self.module.apply({"params": params}, *arguments, method=method)


def commit(
    caches: tuple[Any, ...], updates: tuple[Any, ...], count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
) -> tuple[Any, ...]:
    """Commits the accepted tokens of every layer's cache update: the first `count[b]` of row b, or those of `path[b]`.

    caches: of the layers.
    updates: `Forward.cache_updates`.
    count: accepted tokens per row.
    path: which tokens, of a tree; None: the first ones.
    """
    return tuple(cache.commit(new, count, path) for cache, new in zip(caches, updates, strict=True))
