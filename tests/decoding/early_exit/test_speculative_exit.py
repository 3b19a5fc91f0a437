"""SpecEE exits where its predictors say, skipped layers are never attended to, and threshold 1 is plain decoding."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import HintedProposal, LayerProposal, Proposal
from decodax.decoding.drafters.hints import Hints
from decodax.decoding.early_exit.speculative_exit import SpeculativeExit, exit_features, exit_score, token_logits
from decodax.decoding.speculative_decoding import speculative
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.attention.mask import Ancestors
from decodax.models.head import HeadConfig
from decodax.models.model import Model
from tests.odd_drafters import RandomTrees
from tests.speculation import CAPACITY, LENGTHS, MODEL, NEW, NO_STOPS, OPTIONS, PARAMS, PROMPTS, VOCABULARY, padded
from tests.tiny import tiny_config

# Exits need some layers to leave out: the two of the tiny model, and the first once more.
DEEP = Model(dataclasses.replace(tiny_config(), blocks=(*tiny_config().blocks, tiny_config().blocks[0])))
L, LIKELY, WIDTH = 3, 7, 5
HINTS = Hints(MODEL, num_likely=LIKELY)
EXIT = SpeculativeExit()
TWO_LEVEL = SpeculativeExit(schedule="two_level", hot_layers=(2,), memory=2, reach=1)


def noisy(tree, amount, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [leaf + amount * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, new)


ZEROS = {
    "hidden": jnp.zeros((L - 1, 3 * LIKELY, WIDTH)),
    "hidden_bias": jnp.zeros((L - 1, WIDTH)),
    "out": jnp.zeros((L - 1, WIDTH)),
    "out_bias": jnp.zeros(L - 1),
}
ALWAYS = ZEROS | {"out_bias": jnp.full(L - 1, 9.0, jnp.float32)}
SOMETIMES = noisy(ZEROS, 1.0, 5)
WITHOUT = noisy(DEEP.init(jax.random.key(0)), 0.3, 1)


def with_predictors(weights):
    return WITHOUT | {"exit_predictors": weights}


def start(weights=SOMETIMES, rows=slice(None), options="greedy", layer_policy=EXIT):
    index = np.arange(3)[rows]
    chosen = {name: [v[i] for i in index] if isinstance(v, list) else v for name, v in OPTIONS[options].items()}
    sampling = decoding.Sampling.create(len(index), VOCABULARY, **chosen)
    return decoding.prefill(
        DEEP, with_predictors(weights), PROMPTS[rows], LENGTHS[rows], NEW[rows], index, sampling=sampling,
        stop_token_ids=NO_STOPS, layer_policy=layer_policy,
    )  # fmt: skip


@cache
def compiled(drafter, layer_policy):
    return jax.jit(speculative(DEEP, drafter, ExactMatch(), layer_policy))


def run(weights, layer_policy=EXIT, rows=slice(None), drafter=HINTS, draft_params=PARAMS, options="greedy"):
    params, state = with_predictors(weights), start(weights, rows, options)
    layer_policy.check(DEEP, params)
    # The prefill does not depend on the schedule, so one compiled program serves all.
    state = dataclasses.replace(state, layer_policy=layer_policy.start(DEEP, params, len(state.length)))
    return compiled(drafter, layer_policy)(params, draft_params, state)


@cache
def plain(options):
    return jax.jit(decoding.autoregressive(DEEP))(WITHOUT, start(options=options, layer_policy=None))


def texts(state):
    return [np.asarray(row)[:length] for row, length in zip(state.tokens, np.asarray(state.length), strict=True)]


@jax.jit
def layer_by_layer(tokens, kept):
    """Logits after 1 .. L layers at every token of whole texts; tokens not kept in a layer skip it and are masked."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, out = DEEP.embed(WITHOUT, tokens, tokens * 0), []
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    themselves = jnp.eye(tokens.shape[1], dtype=bool)[None]
    for index in range(L):
        mask = Ancestors((causal & kept[index][:, None, :]) | themselves)
        new = DEEP.apply(WITHOUT, hidden, position, mask=mask, layers=(index, index + 1)).hidden
        hidden = jnp.where(kept[index][..., None], new, hidden)
        out.append(DEEP.logits(WITHOUT, hidden))
    return jnp.stack(out)


@jax.jit
def draft_logits(tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return MODEL.logits(PARAMS, MODEL.apply(PARAMS, tokens, position).hidden)


def fires(weights, layer, logits, previous):
    """A predictor in NumPy: whether it fires, and its softmax for the next one."""
    weights = {name: np.asarray(leaf, np.float64)[layer - 1] for name, leaf in weights.items()}
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    features = np.concatenate([logits, probs, np.zeros(LIKELY) if previous is None else probs - previous])
    hidden = np.maximum(features @ weights["hidden"] + weights["hidden_bias"], 0)
    return 1 / (1 + np.exp(-(hidden @ weights["out"] + weights["out_bias"]))) > 0.5, probs


def exit_layer(weights, asked, logits, likely):
    """After how many layers a token exits; logits [L, V] of the text as it was decoded."""
    previous = None
    for layer in range(1, L):
        if layer in asked:
            yes, previous = fires(weights, layer, logits[layer - 1][likely].astype(np.float64), previous)
            if yes and logits[layer - 1].argmax() in likely:
                return layer
    return L


def kept_tokens(state):
    """[L, B, S]: which layers have run which tokens, the same for all heads."""
    kept = [np.asarray(layer.kept) for layer in state.caches]
    assert all(np.all(of_layer == of_layer[:, :1]) for of_layer in kept)
    return np.stack([of_layer[:, 0] for of_layer in kept])


@pytest.mark.parametrize("weights", [ALWAYS, SOMETIMES], ids=["always", "sometimes"])
@pytest.mark.parametrize("layer_policy", [EXIT, TWO_LEVEL], ids=["all", "two_level"])
@pytest.mark.quick_cases(1)
def test_every_exit_token_and_count_is_that_of_a_recomputation(weights, layer_policy):
    state = run(weights, layer_policy)
    rows, kept = texts(state), kept_tokens(state)
    tokens = padded(rows, kept.shape[2])
    logits, drafted = np.asarray(layer_by_layer(tokens, jnp.asarray(kept))), np.asarray(draft_logits(tokens))
    layers_run = []
    for b, text in enumerate(rows):
        recent, found = [], []
        for place in range(len(text) - 1):
            assert not kept[:, b, len(text) - 1 :].any()
            if place < LENGTHS[b] - 1:  # of the prompt
                assert kept[:, b, place].all()
                continue
            asked = range(1, L)
            if layer_policy.schedule == "two_level":
                asked = {2} | {layer for last in recent[-2:] for layer in (last - 1, last, last + 1)}
            likely = np.argsort(-drafted[b, place], kind="stable")[:LIKELY]
            exit_at = exit_layer(weights, asked, logits[:, b, place], likely)
            assert kept[:, b, place].tolist() == [layer < exit_at for layer in range(L)]
            assert text[place + 1] == logits[exit_at - 1, b, place].argmax()
            recent.append(exit_at)
            found.append(exit_at)
        layers_run.append(found)
    assert len({layer for found in layers_run for layer in found}) > 1  # some exit, at more than one place
    assert np.asarray(state.layer_counts.row).tolist() == [sum(found) for found in layers_run]
    together = [max(f[i] for f in layers_run if i < len(f)) for i in range(max(map(len, layers_run)))]
    assert int(state.layer_counts.batch) == sum(together)
    assert state.layer_policy.shape == (3, layer_policy.memory)


@pytest.mark.slow
def test_threshold_1_is_plain_decoding():
    """Whatever the predictors say; the drafter's nodes are often what will be decoded, so that paths are long."""
    wanted = plain("sampled")  # one row is greedy
    layer_policy = SpeculativeExit(threshold=1.0)
    state = run(ALWAYS, layer_policy, drafter=RandomTrees(), draft_params=wanted.tokens, options="sampled")
    np.testing.assert_array_equal(state.tokens, wanted.tokens)
    np.testing.assert_allclose(state.logprobs, wanted.logprobs, atol=2e-5)  # logits of at most 5 in float32
    assert int(state.num_target_forwards) < int(wanted.num_target_forwards)
    for mine, theirs in zip(state.caches, wanted.caches, strict=True):
        np.testing.assert_array_equal(mine.length, theirs.length)
        filled = np.arange(mine.capacity)[None] < np.asarray(mine.length)[:, None]
        assert np.all(np.asarray(mine.kept)[:, 0] == filled)
        for name in ("key", "value"):
            one, other = (np.moveaxis(np.asarray(getattr(c, name)), 2, 1)[filled] for c in (mine, theirs))
            np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())  # float32, sums of 31 over 3 layers


@cache
def tree_cases():
    """Trees of 5 nodes in 8 rows; most nodes are what some layer finds most probable after their parent."""
    tree, draw = Tree.fixed((-1, 0, 0, 1, 3)), np.random.default_rng(4)
    prompts = draw.integers(0, VOCABULARY, (8, 5))
    state = decoding.prefill(
        DEEP, with_predictors(ALWAYS), prompts, np.full(8, 5), CAPACITY - 5, np.arange(8), layer_policy=EXIT
    )
    position = state.length[:, None] - 1 + jnp.asarray(tree.depth)

    @jax.jit
    def forward(token):
        out = DEEP.apply(WITHOUT, token, position, state.caches, mask=tree.mask(), capture=tuple(range(1, L + 1)))
        return jnp.stack([DEEP.logits(WITHOUT, hidden) for hidden in out.captured.values()])

    token = np.zeros((8, 5), np.int32)
    token[:, 0] = np.asarray(state.last_token())
    for node in range(1, 5):
        draft_token = np.asarray(forward(jnp.asarray(token))).argmax(axis=3)[:, np.arange(8), tree.parent[0, node]]
        layer = draw.integers(0, L, 8)
        token[:, node] = np.where(
            draw.random(8) < 0.85, draft_token[layer, np.arange(8)], draw.integers(0, VOCABULARY, 8)
        )
    is_candidate = draw.random((8, 5)) < 0.9
    is_candidate[:, 0] = False
    is_candidate[7] = False  # nothing is likely, so no node votes, and nothing may exit early
    proposal = Proposal(jnp.asarray(token), tree, jnp.asarray(is_candidate), None, jnp.int32(0))
    draft_token = np.asarray(forward(proposal.token)).argmax(axis=3)
    return state, proposal, position, draft_token


def walk_agrees(draft_token, token, is_candidate, likely, parents):
    """Whether every voting node on the path of a layer's most probable tokens has them among its likely tokens."""
    nodes = [0]
    for node in nodes:
        if likely[node] and draft_token[node] not in likely[node]:
            return False
        nodes += [
            child for child in range(1, 5)
            if parents[child] == node and is_candidate[child] and token[child] == draft_token[node]
        ]  # fmt: skip
    return bool(likely[0])


@pytest.mark.parametrize("given", [False, True], ids=["children", "likely"])
@pytest.mark.quick_cases(1)
def test_a_tree_exits_when_the_path_of_its_own_tokens_agrees(given):
    state, proposal, position, draft_token = tree_cases()
    token, is_candidate, parents = (
        np.asarray(x) for x in (proposal.token, proposal.is_candidate, proposal.tree.parent)
    )
    likely = [
        [[int(token[b, c]) for c in range(5) if parents[0, c] == node and is_candidate[b, c]] for node in range(5)]
        for b in range(8)
    ]
    if given:  # no hints about node 4; the others have a token more than the tree shows, right or wrong
        likely = [
            [list({int(draft_token[(b + n) % L, b, n]), *own}) if n < 4 else [] for n, own in enumerate(row)]
            for b, row in enumerate(likely)
        ]
        table = [[own + [-1] * (LIKELY - len(own)) for own in row] for row in likely]
        proposal = HintedProposal.extend(proposal, jnp.asarray(table, jnp.int32))
    wanted = [
        next(
            (
                i + 1
                for i in range(L - 1)
                if walk_agrees(draft_token[i, b], token[b], is_candidate[b], likely[b], parents[0])
            ),
            L,
        )
        for b in range(8)
    ]
    assert len(set(wanted)) > 2 and L in wanted
    reached = jax.jit(
        lambda state, proposal: SpeculativeExit().forward(
            DEEP, with_predictors(ALWAYS), state, proposal, position, (0, 1, L)
        )
    )(state, proposal)
    assert np.asarray(reached.row_layers).tolist() == wanted and int(reached.layers_run) == max(wanted)
    for index, update in enumerate(reached.forward.cache_updates):
        np.testing.assert_array_equal(update.kept, np.repeat(index < np.array(wanted)[:, None], 5, axis=1))
    np.testing.assert_array_equal(reached.state[:, 0], wanted)
    captured = {layer: np.asarray(hidden) for layer, hidden in reached.forward.captured.items()}
    early = np.array(wanted) <= 1
    np.testing.assert_array_equal(captured[1][early], captured[L][early])
    assert not np.any(np.all(captured[1] == captured[L], axis=(1, 2)) & ~early)
    np.testing.assert_array_equal(captured[L], reached.forward.hidden)
    np.testing.assert_array_equal(captured[0], DEEP.embed(WITHOUT, proposal.token, proposal.token * 0))


@pytest.mark.parametrize("tied", [False, True])
def test_features_are_those_of_numpy(tied):
    model = Model(dataclasses.replace(tiny_config(), tie_embeddings=tied, head=HeadConfig(scale=0.7, softcap=5.0)))
    params = {name: leaf for name, leaf in PARAMS.items() if name != "head" or not tied}
    draw = np.random.default_rng(2)
    normed = draw.normal(size=(2, 3, 23)).astype(np.float32)
    tokens = draw.integers(0, VOCABULARY, (2, 3, LIKELY)).astype(np.int32)
    tokens[1, 2, 3:] = -1
    head = np.asarray(params["embedding" if tied else "head"], np.float64)
    filled = np.where(tokens < 0, tokens[..., :1], tokens)
    logits = 5 * np.tanh(0.7 * np.einsum("btd,btid->bti", normed.astype(np.float64), head[filled]) / 5)
    found = token_logits(model, params, jnp.asarray(normed), jnp.asarray(tokens))
    np.testing.assert_allclose(found, logits, atol=1e-5)
    previous = draw.dirichlet(np.ones(LIKELY), (2, 3)).astype(np.float32)
    previous[0, 1] = -1
    features, probs = exit_features(found, jnp.asarray(previous))
    wanted = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    change = wanted - previous
    change[0, 1] = 0
    np.testing.assert_allclose(probs, wanted, atol=1e-5)
    np.testing.assert_allclose(features, np.concatenate([logits, wanted, change], axis=2), atol=1e-5)
    weights = jax.tree.map(lambda leaf: leaf[1], SOMETIMES)
    score = np.asarray(exit_score(weights, features))
    own, _ = fires(SOMETIMES, 2, logits[0, 1], None)
    assert (score[0, 1] > 0) == own and score.shape == (2, 3)


def test_bad_inputs_are_refused():
    for options, message in (
        ({"threshold": 1.5}, "threshold must be in 0..1"),
        ({"schedule": "some"}, "schedule must be one of all, two_level"),
        ({"hot_layers": (1,)}, "hot_layers go with"),
        ({"schedule": "two_level"}, "needs at least one"),
        ({"memory": 0}, "memory must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeExit(**options)
    params = with_predictors(SOMETIMES)
    SpeculativeExit().check(DEEP, params)
    with pytest.raises(ValueError, match="hold no 'exit_predictors'"):
        SpeculativeExit().check(DEEP, WITHOUT)
    with pytest.raises(ValueError, match=r"must be \[L-1 = 1, 3 x tokens, width\], got \(2, 21, 5\)"):
        SpeculativeExit().check(MODEL, params)
    with pytest.raises(ValueError, match=r"hot_layers must be in 1..2"):
        SpeculativeExit(schedule="two_level", hot_layers=(3,)).check(DEEP, params)
    with pytest.raises(ValueError, match="invariant=True"):
        SpeculativeExit().check(Model(DEEP.config, invariant=True), params)
    state, drafter = start(), Hints(MODEL, num_likely=3)
    with pytest.raises(ValueError, match="read 7 likely tokens, the drafter gives 3"):
        jax.eval_shape(speculative(DEEP, drafter, ExactMatch(), EXIT), params, PARAMS, state)
    position = state.length[:, None] - 1
    vectors = DEEP.embed(WITHOUT, state.last_token()[:, None], state.length[:, None])
    drafted = LayerProposal(
        state.last_token()[:, None], Tree.chain(1), jnp.zeros((3, 1), bool), None, jnp.int32(0), hidden=vectors
    )
    with pytest.raises(ValueError, match="a network of its own"):
        EXIT.forward(DEEP, params, state, drafted, position, ())
