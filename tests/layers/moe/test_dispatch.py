"""Every dispatch algorithm equals a loop in NumPy float64, on 1 and on 8 devices, for all kinds of routes."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.feed_forward import ClampedSwiGLU
from decodax.layers.moe.dispatch import METHODS
from decodax.layers.moe.dispatch.all_to_all import AllToAll
from decodax.layers.moe.dispatch.contract import ExpertDispatch, Setting
from decodax.layers.moe.dispatch.dense import Dense
from decodax.layers.moe.dispatch.gather_scatter import GatherScatter
from decodax.layers.moe.dispatch.hierarchical import Hierarchical
from decodax.layers.moe.dispatch.selection import FEW_CHOICES, select_dispatch
from decodax.layers.moe.dispatch.sliced import Sliced
from decodax.layers.moe.dispatch.sorted import Sorted
from decodax.layers.moe.exchange import default_capacity
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routes import Routes
from decodax.sharding.rules import Rules
from tests.oracles.mixture_of_experts import mixture

TOKENS, WIDTH, FEATURES, CHOICES = 13, 7, 12, 3
MANY, FEW = 16, 2  # experts: more and fewer than devices
TOLERANCE = 1e-5  # sums of at most 12 float32 numbers around 1


def execution(rules, **axes):
    kinds = (AxisType.Auto,) * len(axes)
    return Execution(mesh=jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds), rules=Rules(rules))


FLAT = execution((("E", "device"),), device=8)
NODES = execution((("E", ("node", "device")),), node=2, device=4)
BOTH = execution((("E", "node"), ("F", "device")), node=2, device=4)
FEATURES_SPLIT = execution((("F", "device"),), node=2, device=4)
NOT_SPLIT = execution((), device=8)


def shuffled(num_devices, per_device):
    """All experts placed at random, and the busy first ones also in all remaining slots."""
    slots = np.random.default_rng(5).permutation(num_devices * per_device)
    places = [[] for _ in range(MANY)]
    for index, slot in enumerate(slots):
        places[index if index < MANY else index % 3].append((int(slot) // per_device, int(slot) % per_device))
    return Placement(MANY, num_devices, per_device, tuple(map(tuple, places)))


@dataclass(frozen=True)
class Case:
    dispatch: ExpertDispatch
    execution: Execution = ON_THIS_DEVICE
    placement: Placement | None = None
    num_experts: int = MANY
    bias: bool = False  # and with it the activation of gpt-oss


SHUFFLED, FOURTHS, HALVES = shuffled(8, 3), Placement.contiguous(FEW, 8, 4), Placement.contiguous(MANY, 8, 2)
CASES = {
    "dense": Case(Dense(), bias=True),
    "dense, partitioned by the compiler": Case(Dense(), FLAT),
    "dense, copies": Case(Dense(), placement=SHUFFLED, bias=True),
    "dense, slices": Case(Dense(), placement=FOURTHS, num_experts=FEW, bias=True),
    "sorted": Case(Sorted()),
    "sorted, copies": Case(Sorted(), placement=SHUFFLED, bias=True),
    "sorted, slices": Case(Sorted(), placement=FOURTHS, num_experts=FEW, bias=True),
    "sorted, features split": Case(Sorted(), FEATURES_SPLIT, bias=True),
    "all to all": Case(AllToAll(), FLAT),
    "all to all, one at a time": Case(AllToAll(1), FLAT, bias=True),
    "all to all, copies": Case(AllToAll(2), FLAT, SHUFFLED, bias=True),
    "all to all, slices": Case(AllToAll(), FLAT, HALVES, bias=True),
    "all to all, two axes": Case(AllToAll(2), NODES),
    "all to all, features split": Case(AllToAll(4), BOTH, bias=True),
    "hierarchical": Case(Hierarchical(), NODES),
    "hierarchical, one at a time": Case(Hierarchical(1), NODES, SHUFFLED, bias=True),
    "gather scatter": Case(GatherScatter(), FLAT, bias=True),
    "gather scatter, copies": Case(GatherScatter(), NODES, SHUFFLED),
    "gather scatter, features split": Case(GatherScatter(), BOTH, bias=True),
    "gather scatter, slices": Case(GatherScatter(), FLAT, FOURTHS, FEW, bias=True),
    "sliced, more experts gathered": Case(Sliced(0), FLAT, bias=True),
    "sliced, degree 0": Case(Sliced(0), FLAT, FOURTHS, FEW, bias=True),
    "sliced, degree 1": Case(Sliced(1), FLAT, FOURTHS, FEW, bias=True),
    "sliced, degree 2": Case(Sliced(2, 1), FLAT, FOURTHS, FEW, bias=True),
    "sliced, degree 4": Case(Sliced(4, 1), FLAT, FOURTHS, FEW, bias=True),
    "sliced, degree chosen": Case(Sliced(), FLAT, FOURTHS, FEW),
}


@cache
def weights_of(num_experts, bias):
    random = np.random.default_rng(num_experts)
    shapes = {"gate": (FEATURES, WIDTH), "up": (FEATURES, WIDTH), "down": (WIDTH, FEATURES)}
    if bias:
        shapes |= {"gate_bias": (FEATURES,), "up_bias": (FEATURES,), "down_bias": (WIDTH,)}
    return {
        name: (random.standard_normal((num_experts, *shape)) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def activation_of(case):
    return ClampedSwiGLU(1.7, 0.9) if case.bias else "silu"


def runner(case):
    """The case as a function of (tokens, routes, weights), jitted."""
    setting = Setting(activation_of(case), case.execution, case.placement)
    return jax.jit(lambda tokens, routes, weights: case.dispatch.run(tokens, routes, weights, setting))


def arranged(case, nonfinite=()):
    """The weights in the case's placement, those of some experts NaN."""
    weights = {name: jnp.asarray(weight) for name, weight in weights_of(case.num_experts, case.bias).items()}
    for expert in nonfinite:
        weights = {name: weight.at[expert].set(jnp.nan) for name, weight in weights.items()}
    return weights if case.placement is None else case.placement.arrange(weights)


def all_routes(num_experts):
    """Choices [TOKENS, CHOICES] by name; -1 is no choice."""
    random = np.random.default_rng(9)
    per_token = min(CHOICES, num_experts)
    nothing = np.full((TOKENS, CHOICES), -1)
    anything = nothing.copy()
    anything[:, :per_token] = [random.permutation(num_experts)[:per_token] for _ in range(TOKENS)]
    with_gaps = np.where(random.random(anything.shape) < 0.4, -1, anything)
    with_gaps[3] = -1
    one_takes_all = nothing.copy()
    one_takes_all[:, 1] = num_experts - 1
    three_at_most = np.where(anything >= 0, anything % 3 % num_experts, -1)  # experts may be chosen twice
    return {
        "anything": anything,
        "gaps": with_gaps,
        "one takes all": one_takes_all,
        "empty experts": three_at_most,
        "nothing": nothing,
    }


def overflow(case, expert):
    """Choices beyond the capacity of each pair of devices, counted one by one."""
    capacity = getattr(case.dispatch, "capacity", None)
    if not hasattr(case.dispatch, "capacity") or getattr(case.dispatch, "degree", None) == 0:
        return 0
    num_devices = case.execution.num_shards("E")
    placement = case.placement or Placement.contiguous(case.num_experts, num_devices)
    slices = placement.slices
    degree = (getattr(case.dispatch, "degree", None) or slices) if isinstance(case.dispatch, Sliced) else slices
    share = -(-len(expert) // num_devices)
    capacity = capacity or default_capacity(share * expert.shape[1] * degree, num_devices)
    sent = {}
    for token, chosen in enumerate(expert):
        for e in chosen[chosen >= 0]:
            for index in range(degree):
                if isinstance(case.dispatch, Sliced) and slices > 1:
                    device = e * slices + index * (slices // degree) + token % (slices // degree)
                else:
                    places = placement.replicas[e * slices + index]
                    device = places[token % len(places)][0]
                pair = (token // share, int(device))
                sent[pair] = sent.get(pair, 0) + 1
    return sum(max(0, number - capacity) for number in sent.values())


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens(name):
    case, random = CASES[name], np.random.default_rng(1)
    run, weights = runner(case), weights_of(case.num_experts, case.bias)
    tokens = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    gate = random.random((TOKENS, CHOICES)).astype(np.float32)
    counted = set()
    for which, expert in all_routes(case.num_experts).items():
        unused = set(range(case.num_experts)) - set(expert.ravel())
        chosen = arranged(case, unused if which == "empty experts" else ())
        output, num_overflowed = run(jnp.asarray(tokens), Routes.of(jnp.asarray(expert), jnp.asarray(gate)), chosen)
        wanted = mixture(tokens, expert, gate, weights, activation_of(case))
        np.testing.assert_allclose(output, wanted, rtol=0, atol=TOLERANCE, err_msg=which)
        assert num_overflowed == overflow(case, expert), which
        counted.add(int(num_overflowed))
    if getattr(case.dispatch, "capacity", None) is not None:
        # The capacity was small enough, except where a device has only two tokens that alternate.
        assert len(counted) > 2 or getattr(case.dispatch, "degree", None) == 2

    # A non-finite token, and a non-finite gate, change no other token.
    nonfinite, nonfinite_gate = tokens.copy(), gate.copy()
    nonfinite[4], nonfinite_gate[6, 0] = np.nan, np.inf
    expert = all_routes(case.num_experts)["anything"]
    finite = mixture(tokens, expert, gate, weights, activation_of(case))
    output, _ = run(jnp.asarray(nonfinite), Routes.of(jnp.asarray(expert), jnp.asarray(nonfinite_gate)), arranged(case))
    others = ~np.isin(np.arange(TOKENS), [4, 6])
    np.testing.assert_allclose(output[others], finite[others], rtol=0, atol=TOLERANCE)
    assert np.all(np.isnan(output[4])) and not np.any(np.isfinite(output[6]))


@pytest.mark.parametrize(
    "name", ["dense", "sorted", "all to all", "gather scatter", "sliced, degree 2", "sliced, degree 0"]
)
def test_a_token_alone_and_without_jit(name):
    case, random = CASES[name], np.random.default_rng(2)
    run, weights = runner(case), arranged(case)
    tokens = jnp.asarray(random.standard_normal((TOKENS, WIDTH)), jnp.float32)
    expert = jnp.asarray(all_routes(case.num_experts)["gaps"])
    routes = Routes.of(expert, jnp.asarray(random.random(expert.shape), jnp.float32))
    together, num_overflowed = run(tokens, routes, weights)
    for token in (0, 3, 12):  # the fourth has no expert
        alone = replace(routes, expert=routes.expert[token : token + 1], gate=routes.gate[token : token + 1])
        output, _ = run(tokens[token : token + 1], alone, weights)
        np.testing.assert_allclose(output[0], together[token], rtol=0, atol=TOLERANCE)
    if name == "sorted":
        eager, same_number = run.__wrapped__(tokens, routes, weights)
        np.testing.assert_allclose(eager, together, rtol=0, atol=TOLERANCE)
        assert same_number == num_overflowed


def test_sharded_and_replicated_inputs_give_the_same():
    """Tokens and weights that are already sharded over the mesh, inside a larger program."""
    case, mesh = CASES["all to all"], FLAT.mesh
    setting = Setting("silu", FLAT)
    weights = {name: jnp.asarray(weight) for name, weight in weights_of(MANY, False).items()}
    spread = jax.device_put(weights, jax.NamedSharding(mesh, jax.P("device")))
    tokens = jnp.asarray(np.random.default_rng(3).standard_normal((16, WIDTH)), jnp.float32)
    expert = jnp.asarray(np.random.default_rng(4).integers(0, MANY, (16, 2)))
    routes = Routes.of(expert, jnp.ones((16, 2)))

    @jax.jit
    def program(tokens, weights):
        return jax.lax.fori_loop(0, 2, lambda _, x: x + case.dispatch.run(x, routes, weights, setting)[0], tokens)

    wanted = tokens
    for _ in range(2):
        wanted = wanted + Dense().run(wanted, routes, weights, Setting("silu", ON_THIS_DEVICE))[0]
    for spec in (jax.P(), jax.P("device")):
        placed = jax.device_put(tokens, jax.NamedSharding(mesh, spec))
        np.testing.assert_allclose(program(placed, spread), wanted, rtol=0, atol=2 * TOLERANCE)


def test_dense_does_not_depend_on_the_neighbours():
    """Bit for bit, as the invariant mode requires."""
    run, random = runner(CASES["dense"]), np.random.default_rng(6)
    tokens = random.standard_normal((16, WIDTH)).astype(np.float32)
    expert = random.integers(0, MANY, (16, CHOICES))
    gate = random.random((16, CHOICES)).astype(np.float32)
    outputs = []
    for _ in range(3):
        tokens[1:], expert[1:] = random.standard_normal((15, WIDTH)), random.integers(0, MANY, (15, CHOICES))
        routes = Routes.of(jnp.asarray(expert), jnp.asarray(gate))
        outputs.append(np.asarray(run(jnp.asarray(tokens), routes, arranged(CASES["dense"]))[0][0]))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_the_default_dispatch():
    assert select_dispatch(ON_THIS_DEVICE, 10**6) == Sorted()
    assert select_dispatch(FEATURES_SPLIT, 10**6) == Sorted()
    assert select_dispatch(FLAT, FEW_CHOICES) == GatherScatter()
    assert select_dispatch(FLAT, FEW_CHOICES + 1) == AllToAll()
    assert select_dispatch(NODES, FEW_CHOICES + 1) == Hierarchical()
    assert select_dispatch(replace(FLAT, experts="dense"), 1) == Dense()
    assert select_dispatch(replace(FLAT, experts=AllToAll(3)), 1) == AllToAll(3)
    assert {type(case.dispatch) for case in CASES.values()} == set(METHODS.values())
    hash(replace(FLAT, experts=AllToAll(3)))


def attempt(case, num_experts=MANY):
    weights = {name: jnp.asarray(weight) for name, weight in weights_of(num_experts, False).items()}
    routes = Routes.of(jnp.zeros((5, 1), jnp.int32), jnp.ones((5, 1)))
    case.dispatch.run(jnp.zeros((5, WIDTH)), routes, weights, Setting("silu", case.execution, case.placement))


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


@pytest.mark.parametrize(
    "name", ["dense", "sorted", "all to all", "hierarchical", "gather scatter", "sliced, degree 2"]
)
@pytest.mark.parametrize("shape", [(TOKENS - 1, CHOICES), (1, CHOICES), (TOKENS, 1, CHOICES)], ids=str)
def test_routes_of_other_tokens_are_refused(name, shape):
    """More, fewer or one route for all; padding and gathering would hide it, and some tokens get no expert."""
    case = CASES[name]
    routes = Routes.of(jnp.zeros(shape, jnp.int32), jnp.ones(shape))
    message = rf"routes must be \[M, X\] for {TOKENS} tokens \(M\), got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        runner(case)(jnp.zeros((TOKENS, WIDTH)), routes, arranged(case))
