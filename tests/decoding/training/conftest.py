"""Gives a target of one layer, and lets optax mix dtypes in every test of this folder."""

import pytest

from tests.decoding.training.small import target_of


@pytest.fixture(autouse=True)
def allow_optax(optax_may_promote):
    pass


@pytest.fixture(scope="session")
def target():
    return target_of(1)
