"""Every drafter and every layer policy runs on every kind of model: experts, latent attention, recurrent layers.

With exact match the tokens, logprobs and caches are those of plain decoding, which is tested against full forwards. A
rejected node that changed a recurrent state would change all of these.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding import drafters, early_exit
from decodax.decoding.drafters import DynamicExit, NoDraft
from decodax.decoding.early_exit import AllLayers
from decodax.decoding.early_exit.layer_stack import run_stack
from decodax.decoding.training.prompt_tokens import _logits as prompt_token_logits
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.kv_cache.recurrent import RecurrentCache
from decodax.models.model import Model, commit
from tests.contracts.examples import drafters as drafter_examples
from tests.contracts.examples import early_exit as policy_examples
from tests.contracts.examples.drafters import Target
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside
from tests.model_kinds import (
    IS_RECURRENT,
    LAYERS,
    LENGTHS,
    NEW,
    WIDTH,
    draft_of,
    full_forward,
    model_of,
    params_of,
    plain,
    start,
)
from tests.speculation import TOLERANCE, assert_same, assert_same_caches

ALL_LAYERS = AllLayers()
DRAFTERS = examples_of(drafter_examples, with_outside(drafters.METHODS, "drafters"))
POLICIES = examples_of(policy_examples, with_outside(early_exit.METHODS, "early_exit"))
EXAMPLES = [*DRAFTERS, *(name for name in POLICIES if not name.endswith(policy_examples.SKIPS))]
# Examples with their own handling of layers; the others, and the same for other kinds, are slow, because of compiling.
FAST = {
    "hybrid": {"all_layers", "routed_layers, all layers"},
    "recurrent": {"kangaroo"},
    "mla": {"speculative_exit, all layers"},
    "moe": {"early_layers"},
    "blocks": {"prompt_tokens, ensemble"},
}
assert all(FAST[kind] <= {*EXAMPLES} for kind in LAYERS)
CASES = [
    pytest.param(kind, name, marks=() if name in FAST[kind] else pytest.mark.slow, id=f"{kind}-{name}")
    for kind in LAYERS
    for name in EXAMPLES
]


@cache
def example(kind, name):
    recorded = jnp.pad(plain(kind).tokens, ((0, 0), (0, 1)))
    made = DRAFTERS[name] if name in DRAFTERS else POLICIES[name]
    return made(Target(model_of(kind), params_of(kind), draft_of(kind), recorded))


def exit_layer(kind):
    return len(LAYERS[kind]) - 1


@cache
def compiled(kind, drafter, layer_policy):
    return jax.jit(decoding.speculative(model_of(kind), drafter, ExactMatch(), layer_policy))


def run(kind, own, begun=None):
    params, layer_policy = getattr(own, "params", params_of(kind)), getattr(own, "layer_policy", ALL_LAYERS)
    begun = start(kind, params, layer_policy=layer_policy) if begun is None else begun
    return compiled(kind, own.drafter, layer_policy)(params, own.draft_params, begun)


def caches_of(kind, params, tokens, count):
    """Caches filled with the first `count[b]` tokens of texts in one forward."""
    rows, _ = full_forward(kind)(params, tokens)
    return committed(model_of(kind).empty_cache(*tokens.shape, jnp.float32), rows, count)


committed = jax.jit(commit)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(2)
def test_plain_decoding_is_that_of_full_forwards(kind):
    state = plain(kind)
    _, logits = full_forward(kind)(params_of(kind), state.tokens)
    probs = jax.nn.log_softmax(np.asarray(logits, np.float64), axis=2)
    for row, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        place = np.arange(length, length + new)
        token = np.asarray(state.tokens[row])[place]
        np.testing.assert_allclose(state.logprobs[row][place], probs[row, place - 1, token], atol=TOLERANCE)
        if row == 0:
            np.testing.assert_array_equal(token, np.argmax(probs[row, place - 1], axis=1))
    assert len(set(np.asarray(state.tokens[0])[LENGTHS[0] : LENGTHS[0] + NEW[0]])) > 2
    read = caches_of(kind, params_of(kind), state.tokens, state.length - 1)
    assert_same_caches(state.caches, read)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_plain_decoding(kind, name):
    own = example(kind, name)
    state = run(kind, own)
    assert_same(state, plain(kind))
    accepted, proposed = int(state.counts.accepted.sum()), int(state.counts.proposed.sum())
    assert 2 < accepted < proposed or not own.drafter.max_depth  # otherwise nothing was tested
    check = DRAFT_CACHES.get(name)
    if check is not None:
        check(kind, own, state)


def check_draft_model(kind, own, state):
    """The draft's own caches hold the first tokens of the text, and nothing that the target rejected."""
    count = state.draft[0].length
    assert np.all((np.asarray(count) < state.length) & (np.asarray(count) > state.length - 4))
    assert_same_caches(state.draft, caches_of(kind, draft_of(kind), state.tokens, count))


def check_adapter(kind, own, state):
    """It holds every token of a text but the last one."""
    adapter, layers = own.drafter.adapter, (0, exit_layer(kind))

    @jax.jit
    def read(params, weights, tokens):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out = model_of(kind).apply(params, tokens, position, layers=layers)
        return adapter.apply(weights, out.hidden, position)[1]

    update = read(params_of(kind), own.draft_params["adapter"], state.tokens)
    empty = adapter.empty_cache(*state.tokens.shape, jnp.float32)
    assert_same_caches((state.draft,), committed((empty,), (update,), state.length - 1))


def check_nested(kind, own, state):
    """States that cannot be rolled back hold every token of the text but the last one."""
    caches = state.draft.caches
    read = caches_of(kind, draft_of(kind), state.tokens, state.length - 1)
    pairs = [pair for pair in zip(caches, read, strict=True) if isinstance(pair[0], RecurrentCache)]
    assert bool(pairs) == any(block.mixer.layer in IS_RECURRENT for block in model_of(kind).config.blocks)
    if pairs:
        assert_same_caches(*zip(*pairs, strict=True))


DRAFT_CACHES = {
    "draft_model, chain": check_draft_model,
    "draft_model, tree": check_draft_model,
    "kangaroo": check_adapter,
    "nested": check_nested,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("recurrent", "mla") else pytest.mark.slow) for kind in LAYERS]
)
def test_tokens_that_exit_leave_deeper_layers_as_they_were(kind):
    """Every token exits after the first layer: tokens of a one-layer model, states as after the prefill.

    For sampled rows: in a greedy row a single token is likely.
    """
    rows = np.array([1, 2])
    own = example(kind, f"speculative_exit, {policy_examples.SKIPS}")
    begun = start(kind, own.params, layer_policy=own.layer_policy)
    state = run(kind, own, begun)
    one_layer = Model(dataclasses.replace(model_of(kind).config, blocks=model_of(kind).config.blocks[:1]))
    alone = dataclasses.replace(start(kind), caches=begun.caches[:1])
    want = jax.jit(decoding.autoregressive(one_layer))(params_of(kind), alone)
    np.testing.assert_array_equal(state.tokens[rows], want.tokens[rows])
    np.testing.assert_allclose(state.logprobs[rows], want.logprobs[rows], atol=TOLERANCE)
    caches, prompts = jax.tree.map(lambda leaf: leaf[rows], (state.caches, begun.caches))
    assert_same_caches(caches[:1], want.caches, rows)
    for got, before in zip(caches[1:], prompts[1:], strict=True):
        np.testing.assert_array_equal(got.length, want.length[rows] - 1)
        unchanged = ("state", "tail") if isinstance(got, RecurrentCache) else ("kept",)
        for name in unchanged:
            jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(before, name))


@pytest.mark.parametrize("kind", ["hybrid", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_layers_that_a_row_leaves_out_stay_empty(kind):
    """Rows skip layers entirely: their states never change, and drafts change nothing of what is decoded."""
    own = example(kind, f"routed_layers, {policy_examples.SKIPS}")
    begun = start(kind, own.params, layer_policy=own.layer_policy)
    runs = np.asarray(begun.layer_policy)
    assert runs[2].all() and not runs[:2].all()  # a prompt of one token decides nothing
    state = run(kind, own, begun)
    alone = run(kind, dataclasses.replace(own, drafter=NoDraft(), draft_params=None), begun)
    np.testing.assert_array_equal(state.tokens, alone.tokens)
    np.testing.assert_allclose(state.logprobs, alone.logprobs, atol=TOLERANCE)
    for index, (got, want) in enumerate(zip(state.caches, alone.caches, strict=True)):
        np.testing.assert_array_equal(got.length, state.length - 1)
        if isinstance(got, RecurrentCache):
            assert_same_caches((got,), (want,))
            for leaf in jax.tree.leaves((got.state, got.tail)):
                np.testing.assert_array_equal(np.any(leaf, axis=tuple(range(1, leaf.ndim))), runs[:, index])


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_tokens_that_leave_out_a_layer_change_no_state(kind):
    """Some rows run fewer than five tokens, one at a time: states are those of the tokens that ran."""
    model, count = model_of(kind), jnp.array([5, 2, 0], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (3, 5))
    empty = model.empty_cache(3, 8, jnp.float32)
    all_of, none_of = jnp.full(3, 5, jnp.int32), jnp.zeros(3, jnp.int32)

    @jax.jit
    def caches(params, hidden, count):
        out = run_stack(model, params, hidden, position, empty, lambda index, hidden: position < count[:, None])
        nothing = run_stack(model, params, hidden, position, empty, lambda index, hidden: False)
        return (
            commit(empty, out.forward.cache_updates, all_of),
            commit(empty, out.forward.cache_updates, count),
            nothing.forward.cache_updates,
        )

    hidden = jax.random.normal(jax.random.key(5), (3, 5, WIDTH))
    whole, ran, nothing = caches(params_of(kind), hidden, count)
    full = committed(committed(empty, nothing, none_of), nothing, all_of)
    for index, (got, want, untouched) in enumerate(zip(whole, ran, full, strict=True)):
        np.testing.assert_array_equal(got.length, all_of)
        if isinstance(got, RecurrentCache):
            assert np.any(got.state)
            assert_same_caches((dataclasses.replace(got, length=count),), (want,))
            assert not any(map(np.any, jax.tree.leaves((untouched.state, untouched.tail))))
        else:
            assert index == 0 and kind == "hybrid"


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_exit_counts_start_empty_where_the_prompts_cannot_be_run_again(kind):
    begun = DynamicExit(model_of(kind), 3).start(params_of(kind), None, start(kind))
    assert not any(map(np.any, jax.tree.leaves(begun)))


@pytest.mark.parametrize("kind", ["mla", "hybrid"])
def test_the_invariant_mode_is_refused(kind):
    with pytest.raises(ValueError, match=r"this model has no invariant mode: .*use invariant=False"):
        Model(model_of(kind).config, invariant=True)


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("moe", "mla")), "hybrid"])
@pytest.mark.slow
def test_prompt_tokens_train_on_the_model_s_continuation_at_each_cut(kind):
    """Against forwards over whole texts: the model's own continuation at every cut, and the prompt tokens after it."""
    model, params, distances, size = model_of(kind), params_of(kind), 2, 12
    embedding = jnp.asarray(np.random.default_rng(3).standard_normal((2, 1, WIDTH)), jnp.float32)
    tokens, cut = plain(kind).tokens[:2, :size], np.array([[0, 4, 11], [2, 2, 7]])
    target, predicted = jax.jit(prompt_token_logits, static_argnums=0)(
        model, params, embedding, tokens, jnp.asarray(cut, jnp.int32)
    )

    @jax.jit
    def continued(tokens, place):
        """Logits of a text that continues with the prompt tokens from `place` on."""
        position = jnp.arange(size + distances, dtype=jnp.int32)[None]
        vectors = jax.lax.dynamic_update_slice(
            model.embed(params, tokens, position), embedding[None, :, 0], (0, place, 0)
        )
        return model.logits(params, model.apply(params, vectors, position).hidden)[0]

    for row, number in np.ndindex(cut.shape):
        place = int(cut[row, number]) + 1
        text = np.zeros((3, plain(kind).tokens.shape[1]), np.int32)
        text[:, :place] = tokens[row, :place]
        got = continued(jnp.asarray(text[:1, : size + distances]), place)[place : place + distances]
        np.testing.assert_allclose(predicted[row, number], got, atol=TOLERANCE)
        for step in range(distances + 1):
            _, logits = full_forward(kind)(params, jnp.asarray(text))
            said = logits[0, place - 1 + step]
            text[:, place + step] = np.argmax(said)
            if step > 0:
                np.testing.assert_allclose(target[row, number, step - 1], said, atol=TOLERANCE)
