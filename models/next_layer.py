"""A layer that some checkpoints hold behind the model's own: it predicts one token further than the model does.

    x_i = join [norm(embedding of token i + 1); norm(h_i)]      h_i: the model's hidden state, after its final norm
    o_i = norm(block(x_0 .. x_i)),  the model's own head of o_i = logits of token i + 2

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2, where the two halves of `join` stand the other way round;
this is their order in the published weights. That h_i and o_i are taken after a norm is what transformers does. A row's
position is i, that of its hidden state (transformers counts i + 1; only differences of positions matter to it).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import Execution
from decodax.layers.linear import linear
from decodax.layers.norm import RMSNorm, RMSNormConfig
from decodax.layers.weight import Weight, fetch
from decodax.models.checkpoint import StoredWeights, open_part, read_params, shardings_on
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.families._contract import Family
from decodax.models.hf_config import load_config
from decodax.models.layouts import tensor_names
from decodax.models.model import Model, Params
from decodax.models.orbax_arrays import has_arrays, read_metadata
from decodax.models.stored_files import open_weights
from decodax.models.tensor_names import find_names
from decodax.models.transformer import Block

PART = "next_layer"  # its parameters beside the model's


@dataclass(frozen=True)
class NextLayer:
    """Its parameters are {"embedding_norm", "hidden_norm", "join", "block", "final_norm"}; it has a cache of its own.

    block: like the model's last layer. norm: of its own three norms, like the model's final one.
    """

    block: BlockConfig
    norm: RMSNormConfig
    hidden_size: int
    execution: Execution

    def weights(self) -> dict[str, Any]:
        """Descriptions of the weights, nested like the parameters."""
        size = self.hidden_size
        return {
            "embedding_norm": self.norm.weights(size),
            "hidden_norm": self.norm.weights(size),
            "join": Weight(("D", "D"), (size, 2 * size)),
            "block": self.block.weights(size),
            "final_norm": self.norm.weights(size),
        }

    def apply(
        self,
        params: Params,
        embedded: Float[Array, "B T D"],
        hidden: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: Any = None,
        *,
        mask: Mask | None = None,
        row_length: Int[Array, "B #T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """o_i for T new rows of each text, and the rows for the layer's cache; the other arguments as `Model.apply`'s.

        embedded: of token i + 1. hidden: h_i, or o_(i-1) in its place where the model has not been run.
        """
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        return _Module(self).apply({"params": params}, embedded, hidden, position, row_length, cache, mask)

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike) -> Any:
        return self.block.mixer.empty_cache(batch_size, capacity, dtype)

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        return self.block.mixer.empty_rows(batch_size, num_tokens, dtype)


class _Module(nn.Module):
    config: NextLayer

    @nn.compact
    def __call__(self, embedded, hidden, position, row_length, cache, mask):
        config, size = self.config, self.config.hidden_size

        def norm(name: str, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return RMSNorm(config.norm, size, name=name)(inputs)

        with jax.named_scope("next_layer"):
            halves = jnp.concatenate([norm("embedding_norm", embedded), norm("hidden_norm", hidden)], axis=2)
            joined = linear(halves, fetch(self, "join", config.weights()["join"]))
            block = Block(config.block, size, config.execution, name="block")
            out, rows, _ = block(joined, position, row_length, cache, mask)
            return norm("final_norm", out), rows


def next_layer(model: Model) -> NextLayer:
    """The layer that would stand behind this model's last."""
    config = model.config
    return NextLayer(config.blocks[-1], config.final_norm, config.hidden_size, model.execution)


def load_next_layer(folder: Path, model: Model, *, dtype: DTypeLike) -> Params:
    """The first such layer in the folder of this model, whose weights lie where the model's execution asks for them.

    The copies of embedding and head that stand beside it in some files are not read: they are the model's own. Further
    layers, which no DeepSeek-V3 has, are not read either.
    Raises ValueError where the model's family has none or the files do not hold it whole, and where the folder holds
    another model; FileNotFoundError for missing files.
    """
    family, config = load_config(folder)
    if config != model.config:
        raise ValueError(f"{folder} holds another model than the one that its layer shall draft for: give its own")
    prefix = _prefix(family, config)
    if not holds_next_layer(folder, family, config):
        raise ValueError(
            f"the files in {folder} hold no layer that predicts further tokens (no tensor is called {prefix}...): "
            "download them again with all layers, or take another strategy"
        )
    opened, execution = open_next_layer(folder, family, config), model.execution
    sharding_of = shardings_on(execution.mesh, execution.rules)
    return read_params(opened, dtype=jnp.dtype(dtype), sharding_of=sharding_of)[PART]


def holds_next_layer(folder: Path, family: Family, config: ModelConfig) -> bool:
    """Whether a model's folder holds such a layer, or a part of one; ValueError for a family without."""
    prefix = _prefix(family, config)
    if has_arrays(folder):
        return any(name.startswith(f"{PART}.") for name in read_metadata(folder).names)
    stored = open_weights(folder)
    names = find_names(stored, tensor_names(family.layouts(config)))
    return any(names.expected(name).startswith(prefix) for name in stored)


def open_next_layer(folder: Path, family: Family, config: ModelConfig) -> StoredWeights:
    """Its parameters under "next_layer", to be read in parts; ValueError where the files do not hold it whole."""
    names = family.next_layer
    assert names is not None  # or `holds_next_layer` had said so
    layouts = {(PART, *path): stored for path, stored in family.next_layer_layouts(config).items()}
    weights = {PART: next_layer(Model(config)).weights()}
    return open_part(folder, layouts, weights, elsewhere=names.elsewhere(_prefix(family, config)))


def _prefix(family: Family, config: ModelConfig) -> str:
    family.next_layer_layouts(config)  # raises for a family without
    assert family.next_layer is not None
    return family.next_layer.prefix.format(config.num_layers)
