"""Loads and runs the MTP head (multi-token prediction) that some checkpoints hold after the model's last layer.

    x_i = join [norm(embedding of token i + 1); norm(h_i)]      h_i: the model's hidden state, after its final norm
    o_i = norm(block(x_0 .. x_i)),  the model's own head of o_i = logits of token i + 2

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2, with the two halves of `join` swapped: this is their order
in the published weights. As in transformers, h_i and o_i are taken after a norm. The position of x_i is i, that of its
hidden state (transformers counts i + 1; only differences of positions matter).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch
from decodax.layers.attention.mask import Causal, Mask
from decodax.layers.execution import Execution
from decodax.layers.norm import Norm
from decodax.models.checkpoints.model_files import has_orbax_arrays
from decodax.models.checkpoints.model_source import source_of
from decodax.models.checkpoints.name_map_selection import tensor_names
from decodax.models.checkpoints.name_prefix import find_names
from decodax.models.checkpoints.orbax_arrays import read_metadata
from decodax.models.checkpoints.reading import StoredWeights, open_auxiliary_weights, read_params, shardings_on
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.configs.hf_config import load_config
from decodax.models.families.contract import Family
from decodax.models.model import Model, Params
from decodax.models.transformer import Block

MTP_HEAD_KEY = "mtp_head"  # of its parameters beside the model's


@dataclass(frozen=True)
class MTPHeadModel:
    """The MTP head as pure functions; it has a cache of its own.

    Its parameters are {"embedding_norm", "hidden_norm", "join", "block", "final_norm"}.

    block: like the model's last layer.
    norm: of its own three norms, like the model's final one.
    hidden_size: of the model.
    execution: of the model.
    """

    block: BlockConfig
    norm: Norm
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
        """o_i for T new positions of each row, and the head's cache update.

        params: of the head.
        embedded: embedding of token i + 1.
        hidden: h_i, or o_(i-1) where the model has not been run.
        position, cache, mask, row_length: as for `Model.apply`.
        """
        row_length = position + 1 if row_length is None else jnp.broadcast_to(row_length, position.shape)
        mask = Causal() if mask is None else mask
        return _Module(self).apply({"params": params}, embedded, hidden, position, row_length, cache, mask)

    def empty_cache(self, batch_size: int, capacity: int, dtype: DTypeLike) -> Any:
        return self.block.mixer.layer.empty_cache(batch_size, capacity, dtype)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> Any:
        return self.block.mixer.layer.empty_update(batch_size, num_tokens, dtype)


class _Module(nn.Module):
    config: MTPHeadModel

    @nn.compact
    def __call__(self, embedded, hidden, position, row_length, cache, mask):
        config, size = self.config, self.config.hidden_size

        def norm(name: str, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return config.norm.module(size, name=name)(inputs)

        with jax.named_scope("mtp_head"):
            halves = jnp.concatenate([norm("embedding_norm", embedded), norm("hidden_norm", hidden)], axis=2)
            joined = linear(halves, fetch(self, "join", config.weights()["join"]))
            block = Block(config.block, size, config.execution, name="block")
            out, cache_update, _ = block(joined, position, row_length, cache, mask)
            return norm("final_norm", out), cache_update


def mtp_head(model: Model) -> MTPHeadModel:
    """The MTP head for this model."""
    config = model.config
    if config.final_norm is None:
        raise ValueError("an MTP head has the norms of the model's final one, and this model has none")
    return MTPHeadModel(config.blocks[-1], config.final_norm, config.hidden_size, model.execution)


def load_mtp_head(folder: Path, model: Model, *, dtype: DTypeLike) -> Params:
    """Loads the first MTP head in this model's folder, sharded as the model's execution asks.

    The copies of embedding and head beside it in some files are not read: they are the model's own. Further MTP heads,
    which no DeepSeek-V3 has, are not read either.
    Raises ValueError if the family has none, the files do not hold all of it, or the folder holds another model.
    Raises FileNotFoundError for missing files.
    """
    family, config = load_config(folder)
    if config != model.config:
        raise ValueError(f"{folder} must hold the model that its MTP head drafts for, it holds another: give its own")
    prefix = _prefix(family, config)
    if not holds_mtp_head(folder, family, config):
        raise ValueError(
            f"the files in {folder} hold no MTP head (no tensor is called {prefix}...): download them again with all "
            "layers, or take another strategy"
        )
    opened, execution = open_mtp_head(folder, family, config), model.execution
    sharding_of = shardings_on(execution.mesh, execution.rules)
    return read_params(opened, dtype=jnp.dtype(dtype), sharding_of=sharding_of)[MTP_HEAD_KEY]


def holds_mtp_head(folder: Path, family: Family, config: ModelConfig) -> bool:
    """Whether a model's folder holds an MTP head, or some of it; ValueError for a family without."""
    prefix = _prefix(family, config)
    if has_orbax_arrays(folder):
        return any(name.startswith(f"{MTP_HEAD_KEY}.") for name in read_metadata(folder).names)
    stored = source_of(folder).tensors()
    names = find_names(stored, tensor_names(family.name_maps(config)), family.body_prefix)
    return any(names.expected(name).startswith(prefix) for name in stored)


def open_mtp_head(folder: Path, family: Family, config: ModelConfig) -> StoredWeights:
    """Opens its parameters under MTP_HEAD_KEY, to be read by region; ValueError if the files do not hold all of it."""
    names = family.mtp_head
    assert names is not None  # or `holds_mtp_head` had said so
    name_maps = {(MTP_HEAD_KEY, *path): stored for path, stored in family.mtp_head_name_maps(config).items()}
    weights = {MTP_HEAD_KEY: mtp_head(Model(config)).weights()}
    return open_auxiliary_weights(folder, name_maps, weights, elsewhere=names.elsewhere(_prefix(family, config)))


def _prefix(family: Family, config: ModelConfig) -> str:
    family.mtp_head_name_maps(config)  # raises for a family without an MTP head
    assert family.mtp_head is not None
    return family.mtp_head.prefix.format(config.num_layers)
