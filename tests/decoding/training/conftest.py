"""A target of one layer; and optax may mix dtypes in every test of this folder."""

from pathlib import Path

import jax
import pytest

from decodax.models.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from tests.tiny import TINY_LLAMA


@pytest.fixture(autouse=True)
def allow_optax(optax_may_promote):
    pass


@pytest.fixture(scope="session")
def target():
    """Random weights, large enough that its laws are far from uniform."""
    config = read_config(TINY_LLAMA)[1]
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(config).init(jax.random.key(0)))
    return LanguageModel(Model(config), config, params, None, Path("tiny"), (0,))
