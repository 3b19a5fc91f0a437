"""The test session is as strict as `conftest.py` says: a silently disabled check would let everything pass."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from decodax.core.linear import linear
from decodax.layers.attention.mask import Ancestors


def test_shapes_and_types_are_checked():
    with pytest.raises(TypeCheckError, match="weight"):
        linear(jnp.zeros((2, 3)), jnp.zeros((5, 7)))
    with pytest.raises(TypeCheckError, match="parent"):  # beside a `Self`, which alone is not checked
        Ancestors.from_parents(jnp.zeros((2, 3)))


def test_nothing_is_converted_silently():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.zeros(3, jnp.int32) + jnp.zeros(3, jnp.float32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="unexpected"):
        warnings.warn("unexpected", stacklevel=1)


def test_there_are_devices_for_a_mesh_and_products_are_exact():
    assert len(jax.devices()) == 8
    assert jax.config.values["jax_default_matmul_precision"] == "highest"
