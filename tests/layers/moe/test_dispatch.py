"""The right dispatch algorithm is selected, and combinations that none supports are refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.moe.dispatch.all_to_all import AllToAll
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.dispatch.dense import Dense
from decodax.layers.moe.dispatch.gather_scatter import GatherScatter
from decodax.layers.moe.dispatch.hierarchical import Hierarchical
from decodax.layers.moe.dispatch.selection import FEW_CHOICES, select_dispatch
from decodax.layers.moe.dispatch.sliced import Sliced
from decodax.layers.moe.dispatch.sorted import Sorted
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routes import Routes
from decodax.sharding.rules import Rules
from tests.contracts.examples.dispatch import FEATURES_SPLIT, FEW, FLAT, HALVES, MANY, NODES, SHUFFLED, Case
from tests.oracles.mixture_of_experts import mixture

WIDTH, FEATURES = 7, 12
NOT_SPLIT = replace(FLAT, rules=Rules(()))
TOLERANCE = 1e-5  # sums of at most 12 float32 numbers around 1


def weights_of(num_experts):
    random = np.random.default_rng(num_experts)
    shapes = {"gate": (FEATURES, WIDTH), "up": (FEATURES, WIDTH), "down": (WIDTH, FEATURES)}
    return {
        name: jnp.asarray(random.standard_normal((num_experts, *shape)) * shape[-1] ** -0.5, jnp.float32)
        for name, shape in shapes.items()
    }


def test_sharded_and_replicated_inputs_give_the_same():
    """Tokens and weights that are already sharded over the mesh, inside a larger program."""
    mesh, setting = FLAT.mesh, Setting("silu", FLAT)
    weights = weights_of(MANY)
    spread = jax.device_put(weights, jax.NamedSharding(mesh, jax.P("device")))
    tokens = np.random.default_rng(3).standard_normal((16, WIDTH)).astype(np.float32)
    expert, gate = np.random.default_rng(4).integers(0, MANY, (16, 2)), np.ones((16, 2), np.float32)
    routes = Routes.of(jnp.asarray(expert), jnp.asarray(gate))

    @jax.jit
    def program(tokens, weights):
        return jax.lax.fori_loop(0, 2, lambda _, x: x + AllToAll().run(x, routes, weights, setting)[0], tokens)

    wanted = tokens
    for _ in range(2):
        wanted = wanted + mixture(wanted, expert, gate, weights)
    for spec in (jax.P(), jax.P("device")):
        placed = jax.device_put(tokens, jax.NamedSharding(mesh, spec))
        np.testing.assert_allclose(program(placed, spread), wanted, rtol=0, atol=2 * TOLERANCE)


def test_dense_does_not_depend_on_the_neighbours():
    """Bit for bit, as the invariant mode requires."""
    setting, weights, random = Setting("silu", ON_THIS_DEVICE), weights_of(MANY), np.random.default_rng(6)
    run = jax.jit(lambda tokens, routes: Dense().run(tokens, routes, weights, setting)[0])
    tokens = random.standard_normal((16, WIDTH)).astype(np.float32)
    expert = random.integers(0, MANY, (16, 3))
    gate = random.random((16, 3)).astype(np.float32)
    outputs = []
    for _ in range(3):
        tokens[1:], expert[1:] = random.standard_normal((15, WIDTH)), random.integers(0, MANY, (15, 3))
        routes = Routes.of(jnp.asarray(expert), jnp.asarray(gate))
        outputs.append(np.asarray(run(tokens, routes))[0])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_the_default_dispatch():
    assert select_dispatch(ON_THIS_DEVICE, 10**6) == Sorted()
    assert select_dispatch(FEATURES_SPLIT, 10**6) == Sorted()
    assert select_dispatch(FLAT, FEW_CHOICES) == GatherScatter()
    assert select_dispatch(FLAT, FEW_CHOICES + 1) == AllToAll()
    assert select_dispatch(NODES, FEW_CHOICES + 1) == Hierarchical()
    for axes in ({"ep": 8}, {"a": 2, "b": 2, "c": 2}):  # one axis with a name of two letters; three axes
        kinds = (jax.sharding.AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
        split = replace(FLAT, mesh=mesh, rules=Rules((("E", tuple(axes)),)))
        assert select_dispatch(split, FEW_CHOICES + 1) == AllToAll()
    assert select_dispatch(replace(FLAT, experts="dense"), 1) == Dense()
    assert select_dispatch(replace(FLAT, experts=AllToAll(3)), 1) == AllToAll(3)
    hash(replace(FLAT, experts=AllToAll(3)))


def attempt(case, num_experts=MANY):
    routes = Routes.of(jnp.zeros((5, 1), jnp.int32), jnp.ones((5, 1)))
    case.dispatch.run(jnp.zeros((5, WIDTH)), routes, weights_of(num_experts), case.setting)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attempt(Case(AllToAll())), "experts='all_to_all' needs experts that are split over devices"),
        (
            lambda: attempt(Case(GatherScatter(), FEATURES_SPLIT)),
            "'gather_scatter' needs .* On one device use 'sorted'",
        ),
        (lambda: attempt(Case(Hierarchical(), FLAT)), "split over two mesh axes"),
        (lambda: attempt(Case(Sliced(), NOT_SPLIT)), "'sliced' needs experts that are split"),
        (lambda: attempt(Case(Sorted(), FLAT)), "split over mesh axis 'device': use 'all_to_all'"),
        (lambda: attempt(Case(AllToAll(), FLAT), FEW), "8 devices are more than 2 experts .* slices=4"),
        (lambda: attempt(Case(AllToAll(), FLAT), 11), "11 experts do not divide over 8 devices: use a placement"),
        (lambda: attempt(Case(AllToAll(), FLAT, SHUFFLED)), "has 24 slots and the weights are for 16"),
        (
            lambda: attempt(Case(AllToAll(), FLAT, Placement.contiguous(16, 4))),
            "for 4 devices, experts are split over 8",
        ),
        (lambda: attempt(Case(Sliced(3), FLAT, HALVES), 32), "0 or a divisor of the placement's 2 slices, got 3"),
        (lambda: attempt(Case(Sliced(1), FLAT, HALVES), 32), "'sliced' needs the placement Placement.contiguous"),
        (lambda: Sliced(capacity=0), "capacity must be at least 1"),
        (lambda: AllToAll(-1), "capacity must be at least 1"),
        (lambda: select_dispatch(Execution(experts="ragged"), 1), "one of dense, sorted, .*, got 'ragged'"),
        (lambda: select_dispatch(Execution(experts=7), 1), "or an object of theirs, got 7"),
    ],
)
def test_bad_combinations(make, words):
    with pytest.raises(ValueError, match=words):
        make()
