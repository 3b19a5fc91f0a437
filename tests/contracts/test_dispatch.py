"""Every dispatch algorithm equals a loop in NumPy float64, for all kinds of routes and any number of tokens."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.dispatch import METHODS, ExpertDispatch
from decodax.layers.moe.routes import Routes
from tests.contracts.examples import dispatch
from tests.contracts.lookup import examples_of
from tests.oracles.mixture_of_experts import mixture

EXAMPLES = examples_of(dispatch, METHODS)
TOKENS, WIDTH, FEATURES, CHOICES = 13, 7, 12, 3
TOLERANCE = 1e-5  # sums of at most 12 float32 numbers around 1


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


def with_nan(weights, experts):
    """The weights, those of some experts NaN."""
    nonfinite = {name: weight.copy() for name, weight in weights.items()}
    for weight in nonfinite.values():
        weight[sorted(experts)] = np.nan
    return nonfinite


def routes_of(expert, gate):
    return Routes.of(jnp.asarray(expert, jnp.int32), jnp.asarray(gate, jnp.float32))


def run(case, tokens, routes, weights):
    """The case, with weights in the order of the experts."""
    weights = weights if case.placement is None else case.placement.arrange(weights)
    return case.dispatch.run(tokens, routes, weights, case.setting)


run_jitted = jax.jit(run, static_argnums=0)


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
    if case.sent_to is None:
        return 0
    num_devices = case.execution.num_shards("E")
    share = -(-len(expert) // num_devices)  # of the tokens, on each device
    sent = {}
    for token, chosen in enumerate(expert):
        for device in (device for e in chosen[chosen >= 0] for device in case.sent_to(e, token)):
            sent[token // share, device] = sent.get((token // share, device), 0) + 1
    all_choices = share * expert.shape[1] * len(case.sent_to(0, 0))
    capacity = case.dispatch.capacity or min(all_choices, max(8, -(-2 * all_choices // num_devices)))
    return sum(max(0, number - capacity) for number in sent.values())


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.quick_cases(13)
def test_equals_a_loop_over_tokens(name):
    case, random = EXAMPLES[name], np.random.default_rng(1)
    assert type(case.dispatch) is EXAMPLES.method_of(name) and isinstance(case.dispatch, ExpertDispatch)
    weights = weights_of(case.num_experts, case.bias)
    tokens = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    gate = random.random((TOKENS, CHOICES)).astype(np.float32)
    counted = []
    for which, expert in all_routes(case.num_experts).items():
        unused = set(range(case.num_experts)) - set(expert.ravel()) if which == "empty experts" else ()
        routes = routes_of(expert, np.where(expert < 0, np.nan, gate))  # no choice, whatever its gate
        output, num_overflowed = run_jitted(case, tokens, routes, with_nan(weights, unused))
        wanted = mixture(tokens, expert, gate, weights, case.setting.activation)
        np.testing.assert_allclose(output, wanted, rtol=0, atol=TOLERANCE, err_msg=which)
        assert num_overflowed == overflow(case, expert), which
        counted.append(int(num_overflowed))
    assert not case.overflows or max(counted) > 0, "the capacity is small enough"

    # A non-finite token, and a non-finite gate, change no other token.
    nonfinite, nonfinite_gate = tokens.copy(), gate.copy()
    nonfinite[4], nonfinite_gate[6, 0] = np.nan, np.inf
    expert = all_routes(case.num_experts)["anything"]
    finite = mixture(tokens, expert, gate, weights, case.setting.activation)
    output, _ = run_jitted(case, nonfinite, routes_of(expert, nonfinite_gate), weights)
    output, others = np.asarray(output), ~np.isin(np.arange(TOKENS), [4, 6])
    np.testing.assert_allclose(output[others], finite[others], rtol=0, atol=TOLERANCE)
    assert np.all(np.isnan(output[4])) and not np.any(np.isfinite(output[6]))


@pytest.mark.parametrize("name", EXAMPLES.one_of_each)
@pytest.mark.quick_cases(3)
def test_a_token_alone(name):
    case, random = EXAMPLES[name], np.random.default_rng(2)
    weights, expert = weights_of(case.num_experts, case.bias), all_routes(case.num_experts)["gaps"]
    tokens = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    gate = random.random((TOKENS, CHOICES)).astype(np.float32)
    wanted = mixture(tokens, expert, gate, weights, case.setting.activation)
    for token in (0, 3, 12):  # the fourth has no expert
        alone = slice(token, token + 1)
        output, _ = run_jitted(case, tokens[alone], routes_of(expert[alone], gate[alone]), weights)
        np.testing.assert_allclose(output, wanted[alone], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES.one_of_each)
def test_without_jit(name):
    case, random = EXAMPLES[name], np.random.default_rng(3)
    tokens = jnp.asarray(random.standard_normal((TOKENS, WIDTH)), jnp.float32)
    weights = jax.tree.map(jnp.asarray, weights_of(case.num_experts, case.bias))
    routes = routes_of(all_routes(case.num_experts)["gaps"], random.random((TOKENS, CHOICES)))
    (eager, eager_count), (jitted, count) = (
        run(case, tokens, routes, weights),
        run_jitted(case, tokens, routes, weights),
    )
    np.testing.assert_allclose(eager, jitted, rtol=0, atol=TOLERANCE)
    assert eager_count == count


@pytest.mark.parametrize("name", EXAMPLES.one_of_each)
@pytest.mark.parametrize("shape", [(TOKENS - 1, CHOICES), (1, CHOICES), (TOKENS, 1, CHOICES)], ids=str)
def test_routes_of_other_tokens_are_refused(name, shape):
    """More, fewer or one route for all; padding and gathering would hide it, and some tokens get no expert."""
    case = EXAMPLES[name]
    routes, tokens = routes_of(np.zeros(shape), np.ones(shape)), np.zeros((TOKENS, WIDTH), np.float32)
    message = rf"routes must be \[M, X\] for {TOKENS} tokens \(M\), got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        run_jitted(case, tokens, routes, weights_of(case.num_experts, case.bias))
