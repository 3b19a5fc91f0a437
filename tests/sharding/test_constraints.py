"""States are sharded as their classes' annotations say."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from decodax.core import pytree
from decodax.decoding.sizes import cache_bytes
from decodax.layers.kv_cache.full import MarkedCache
from decodax.sharding.constraints import shardings
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES
from tests.sharding import wide


@pytree.dataclass
class Odd:
    rows: Float[Array, "B T V"]
    either: Float[Array, "B N"] | Float[Array, "B N H"] | None
    bare: tuple
    size: int = pytree.static()


def test_by_annotation():
    """Tokens of a forward are never sharded in a state."""
    mesh = read_mesh("data=2,context=2,tensor=2")
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    found = shardings(Odd(shape(4, 2, 6), shape(4, 2, 5), (shape(),), 3), mesh, RULES)
    assert found.rows.spec == PartitionSpec("data", None, "tensor")
    assert found.either.spec == PartitionSpec("data", "tensor", None)
    assert found.bare[0].spec == PartitionSpec()
    found = shardings(Odd(shape(3, 2, 7), None, (), 3), mesh, RULES)  # three rows do not divide, and are replicated
    assert found.rows.spec[0] is None and found.either is None


def test_arrays_without_axes_are_refused():
    """On a mesh they would be whole on every device, without a word."""
    mesh, shape = read_mesh("data=2,tensor=4"), jax.ShapeDtypeStruct((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"must declare their axes, and Odd\.bare\[0\] has none: annotate the field"):
        shardings(Odd(jax.ShapeDtypeStruct((4, 2, 6), np.float32), None, (shape,), 3), mesh, RULES)


def test_caches():
    mesh = read_mesh("data=2,context=2,tensor=2")
    cache = jax.eval_shape(lambda: MarkedCache.empty(4, 2, 16, 5, np.float32))
    found = shardings(cache, mesh, RULES)
    assert found.key.spec == found.value.spec == PartitionSpec("data", "tensor", "context", None)
    assert found.kept.spec == PartitionSpec("data", "tensor", "context")
    assert found.length.spec == PartitionSpec("data")


@pytest.mark.parametrize("kind", wide.LAYERS)
def test_a_run_starts_with_the_declared_shardings(kind):
    model, params = wide.model_of(kind, "tensor=2,data=4"), wide.params_of(kind, "tensor=2,data=4")
    state = wide.start(model, params)
    wanted = jax.tree.leaves(model.execution.shardings(state))
    for leaf, place in zip(jax.tree.leaves(state), wanted, strict=True):
        assert not leaf.size or leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert state.tokens.sharding.spec[0] == "data"


def test_bytes_of_a_cache_in_one_memory():
    """The eight CPU devices share one memory: two key-value heads, held by four devices each."""
    split, whole = (cache_bytes(wide.model_of("dense", mesh), 8, 32, np.float32) for mesh in ("tensor=8", None))
    of_layer = 2 * 8 * 32 * 6 * 4  # keys and values of one head
    lengths = 2 * 8 * 4
    assert whole == (2 + 8) * of_layer + lengths
    assert split == (4 * 2 + 8) * of_layer + 8 * lengths
