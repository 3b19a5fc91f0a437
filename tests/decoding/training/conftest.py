"""A target of one layer; and optax may mix float32 with integer counts, which the rest of the suite forbids."""

from pathlib import Path

import jax
import pytest

from decodax.models.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 22,
    "intermediate_size": 29,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def optax_may_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def target():
    """Random weights, large enough that its laws are far from uniform."""
    config = read_config(CONFIG)[1]
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(config).init(jax.random.key(0)))
    return LanguageModel(Model(config), config, params, None, Path("tiny"), (0,))
