"""Every mixer does what the contract says: in chunks, trees and staged, tokens mix as in their row alone.

What is compared with is a whole forward of one row without a cache; that this is a method's formula is shown in the
method's own tests, against NumPy. So one program serves a row alone, a row whole, and each path of a tree.
"""

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight, named_weights
from decodax.layers.attention.attend_invariant import Tile
from decodax.layers.attention.mask import Ancestors, Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.contract import MarksTokens
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.view import part
from decodax.layers.mixers import METHODS as OURS
from decodax.layers.mixers import Mixer
from decodax.layers.norm import RMSNormConfig
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model
from tests.contracts.examples import mixers
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside
from tests.contracts.updates import token_axes, tokens_of_row, update_of_rows

EXAMPLES = examples_of(mixers, with_outside(OURS, "mixers"))
BATCH, WIDTH, CAPACITY, LONGEST, CHUNK = 3, 13, 19, 16, 5
LENGTHS = np.array([5, 0, 2])  # tokens committed before a tree
# A tree, one with two roots, and a chain.
PARENTS = np.array([[-1, 0, 0, 1, 3, 2, 4], [-1, -1, 0, 2, 1, 4, 4], [-1, 0, 1, 2, 3, 4, 5]])
NODES = PARENTS.shape[1]
# float32: projections of 13, then sums over at most 16 tokens, a few dozen roundings of 2^-24 each.
TOLERANCE = 1e-5
# bfloat16 rounds to 2^-9, in half a dozen products in a row.
ROUGHLY = 0.05


def hidden_states(num_tokens, seed):
    return np.random.default_rng(seed).standard_normal((BATCH, num_tokens, WIDTH)).astype(np.float32)


def positions(first, num_tokens):
    return jnp.asarray(np.reshape(first, (-1, 1)) + np.arange(num_tokens), jnp.int32)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max(initial=0)))


def ancestors_of(parents):
    """reads[i, j]: node j is i or one of its ancestors."""
    reads = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            reads[node] |= reads[parent]
    return reads


ANCESTORS = np.stack([ancestors_of(parents) for parents in PARENTS])

commit = jax.jit(lambda cache, update, count, path=None: cache.commit(update, count, path))
place = jax.jit(lambda buffer, update, slot: buffer.place(update, slot))


class Layer:
    """A mixer with random weights, none of which is neutral."""

    def __init__(self, config, method):
        self.config, self.method = config, method
        self.module = config.module(WIDTH, "mixer", ON_THIS_DEVICE)
        random = np.random.default_rng(0)

        def draw(weight):
            size = 0.5 if len(weight.shape) == 1 else weight.shape[-1] ** -0.5
            return ((weight.init == "ones") + size * random.standard_normal(weight.shape)).astype(np.float32)

        described = config.weights(WIDTH)
        self.params = jax.tree.map(draw, described, is_leaf=lambda leaf: isinstance(leaf, Weight))
        self.run = jax.jit(self.forward)
        self.alone = jax.jit(lambda params, hidden: self.forward(params, hidden, self.chain, None, Causal())[0])
        self.chain = positions(0, LONGEST)

    def forward(self, params, hidden, position, cache, mask):
        return self.module.apply({"params": params}, hidden, position, position + 1, cache, mask)

    def whole(self, hidden, params=None):
        """The outputs [T, D] of one row's tokens, alone, in one forward without a cache."""
        padded = np.zeros((1, LONGEST, WIDTH), np.float32)
        padded[0, : len(hidden)] = hidden
        return np.asarray(self.alone(self.params if params is None else params, padded))[0, : len(hidden)]

    def empty(self, dtype=jnp.float32):
        """An empty cache, in NumPy, so that nothing is compiled for it."""
        shapes = jax.eval_shape(lambda: self.config.empty_cache(BATCH, CAPACITY, dtype))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def nan_update(self, num_tokens):
        shapes = jax.eval_shape(lambda: self.config.empty_update(BATCH, num_tokens, jnp.float32))
        return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)


class Tree:
    """A tree of new tokens in every row, after a prefix of the row's own length."""

    def __init__(self, layer):
        self.layer, self.prefix, self.nodes = layer, hidden_states(CHUNK, 1), hidden_states(NODES, 2)
        # The tokens after a prefix are rejected, whatever they are.
        fed = np.where((np.arange(CHUNK) < LENGTHS[:, None])[..., None], self.prefix, np.nan).astype(np.float32)
        _, update = layer.run(layer.params, fed, positions(np.zeros(BATCH), CHUNK), layer.empty(), Causal())
        self.cache = commit(layer.empty(), update, LENGTHS.astype(np.int32))
        self.depth = ANCESTORS.sum(2) - 1
        self.outputs, self.update = self.run(self.nodes, self.cache)

    def run(self, nodes, cache):
        position = jnp.asarray(LENGTHS[:, None] + self.depth, jnp.int32)
        return self.layer.run(self.layer.params, nodes, position, cache, Ancestors(jnp.asarray(ANCESTORS)))

    @cached_property
    def wanted(self):
        """Each node's output where its path is a row of its own, after the prefix."""
        want = np.zeros((BATCH, NODES, WIDTH), np.float32)
        for row in range(BATCH):
            before = self.prefix[row, : LENGTHS[row]]
            for leaf in sorted(set(range(NODES)) - set(PARENTS[row])):
                path = np.flatnonzero(ANCESTORS[row, leaf])
                want[row, path] = self.layer.whole(np.concatenate([before, self.nodes[row, path]]))[len(before) :]
        return want


@pytest.fixture(scope="module", params=EXAMPLES)
def layer(request):
    return Layer(EXAMPLES[request.param], EXAMPLES.method_of(request.param))


@pytest.fixture(scope="module")
def tree(layer):
    return Tree(layer)


def test_a_config_is_frozen_and_hashable(layer):
    config = layer.config
    assert type(config) is layer.method and isinstance(config, Mixer)
    assert config == dataclasses.replace(config) and hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)


def test_weights_are_those_that_the_module_makes(layer):
    """The same names and shapes."""
    operands = hidden_states(2, 0), positions(np.zeros(BATCH), 2), positions(np.ones(BATCH), 2), None, Causal()
    made = jax.eval_shape(lambda *operands: layer.module.init(*operands)["params"], jax.random.key(0), *operands)
    described = {name: weight.shape for name, weight in named_weights(layer.config.weights(WIDTH))}
    leaves = jax.tree_util.tree_leaves_with_path(made)
    assert {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves} == described


def test_every_weight_is_read(layer):
    """NaN in any of them is in the outputs."""
    hidden = hidden_states(LONGEST, 3)[0]
    assert np.isfinite(layer.whole(hidden)).all()
    leaves, structure = jax.tree.flatten(layer.params)
    for index, leaf in enumerate(leaves):
        changed = [*leaves[:index], np.full_like(leaf, np.nan), *leaves[index + 1 :]]
        assert np.isnan(layer.whole(hidden, jax.tree.unflatten(structure, changed))).any(), index


def test_empty_caches_and_updates_have_the_shapes_of_what_fills_them(layer):
    """In both dtypes: an update of a forward fits `place`, and `commit` gives a cache like the one it got."""

    def made(dtype, capacity=CAPACITY):
        cache = layer.config.empty_cache(BATCH, capacity, dtype)
        assert cache.capacity == capacity and cache.length.shape == (BATCH,)
        return cache, layer.config.empty_update(BATCH, CHUNK, dtype)

    types = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    count, slot = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (BATCH, CHUNK))
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), layer.params)
        hidden = jax.ShapeDtypeStruct((BATCH, CHUNK, WIDTH), dtype)
        (cache, buffer), (longer, _) = (jax.eval_shape(partial(made, dtype, CAPACITY + more)) for more in range(2))
        output, update = jax.eval_shape(layer.forward, params, hidden, positions(LENGTHS, CHUNK), cache, Causal())
        assert output.shape == hidden.shape and output.dtype == dtype
        assert types(update) == types(buffer)
        assert types(jax.eval_shape(place, buffer, update, slot)) == types(buffer)
        assert types(jax.eval_shape(commit, cache, update, count)) == types(cache)
        # What is cached for each token; a state may be of another dtype.
        per_token = [own for own, other in zip(types(cache), types(longer), strict=True) if own != other]
        assert {kind for _, kind in per_token} <= {jnp.dtype(dtype), jnp.dtype(bool)}
    cache, update = jax.jit(partial(made, jnp.float32))()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((cache, update))), "what is empty is all zeros"


def test_a_row_in_chunks_is_the_row_alone_and_whole(layer):
    """Each row goes on after as many of a chunk's tokens as it accepts, and runs the others again."""
    hidden = hidden_states(LONGEST, 4)
    want = np.stack([layer.whole(row) for row in hidden])
    cache, length, rows = layer.empty(), np.zeros(BATCH, np.int32), np.arange(BATCH)[:, None]
    for count in ([5, 2, 0], [1, 5, 3], [1, 0, 1], [4, 3, 5]):
        position = positions(length, CHUNK if max(count) > 1 else 1)
        output, update = layer.run(layer.params, hidden[rows, position], position, cache, Causal())
        close(output, want[rows, position])
        cache = commit(cache, update, np.array(count, np.int32))
        length = length + np.array(count, np.int32)
        np.testing.assert_array_equal(cache.length, length)


def test_a_node_of_a_tree_is_the_last_token_of_its_path(tree):
    close(tree.outputs, tree.wanted)


def test_a_token_is_where_its_position_says(layer, tree):
    """And not where it stands in its forward: in any order with parents before children, outputs are the same."""
    order = np.array([[0, 2, 5, 1, 3, 4, 6], [1, 4, 0, 6, 5, 2, 3], range(NODES)])
    reordered = lambda nodes: np.take_along_axis(nodes, order[..., None], axis=1)
    position = jnp.asarray(LENGTHS[:, None] + np.take_along_axis(tree.depth, order, axis=1), jnp.int32)
    mask = Ancestors(jnp.asarray(np.take_along_axis(reordered(ANCESTORS), order[:, None], axis=2)))
    outputs, update = layer.run(layer.params, reordered(tree.nodes), position, tree.cache, mask)
    close(outputs, reordered(tree.wanted))
    # Committed in the order of a path, they are that path.
    wanted = np.flatnonzero(ANCESTORS[0, 6])
    paths, count = np.zeros((BATCH, NODES), np.int32), np.array([len(wanted), 0, 0], np.int32)
    paths[0, : len(wanted)] = np.argsort(order[0])[wanted]
    cache, following = commit(tree.cache, update, count, paths), hidden_states(CHUNK, 5)
    got, _ = layer.run(layer.params, following, positions(LENGTHS + count, CHUNK), cache, Causal())
    text = np.concatenate([tree.prefix[0, : LENGTHS[0]], tree.nodes[0, wanted], following[0]])
    close(got[0], layer.whole(text)[-CHUNK:])


def test_after_a_committed_path_tokens_follow_it(layer, tree):
    """The deepest node's path, one of a single node, and nothing."""
    nodes = (6, 0, None)
    paths = [np.flatnonzero(ANCESTORS[row, node]) if node is not None else [] for row, node in enumerate(nodes)]
    path, count = np.full((BATCH, NODES), NODES - 1, np.int32), np.array([len(one) for one in paths], np.int32)
    for row, one in enumerate(paths):
        path[row, : len(one)] = one
    cache = commit(tree.cache, tree.update, count, path)
    np.testing.assert_array_equal(cache.length, LENGTHS + count)
    following = hidden_states(CHUNK, 5)
    got, _ = layer.run(layer.params, following, positions(LENGTHS + count, CHUNK), cache, Causal())
    for row, one in enumerate(paths):
        text = np.concatenate([tree.prefix[row, : LENGTHS[row]], tree.nodes[row, one], following[row]])
        close(got[row], layer.whole(text)[-CHUNK:])


@pytest.mark.quick_cases(6)
def test_staged_tokens_are_read_as_those_of_the_same_forward(layer, tree):
    """The first three nodes lie in slots in another order, and slots without a token hold NaN."""
    slots, order = 5, np.array([2, 0, 3])
    axes = token_axes(lambda size: layer.config.empty_update(BATCH, size, jnp.float32))
    first = update_of_rows([tokens_of_row(tree.update, axes, row, range(3)) for row in range(BATCH)], axes)
    update = place(layer.nan_update(slots), first, order)
    node_at = np.array([1, 0, 0, 2, 0])  # any node where there is none
    reads = np.zeros((BATCH, NODES - 3, slots + NODES - 3), bool)
    reads[:, :, order], reads[:, :, slots:] = ANCESTORS[:, 3:, :3], ANCESTORS[:, 3:, 3:]
    position = LENGTHS[:, None] + tree.depth
    staged = Staged(tree.cache, update, jnp.asarray(position[:, node_at], jnp.int32))
    operands = tree.nodes[:, 3:], position[:, 3:].astype(np.int32), staged, Ancestors(jnp.asarray(reads))
    got, _ = layer.run(layer.params, *operands)
    close(got, tree.wanted[:, 3:])

    # The middle row has nothing before its tree.
    hidden, position, staged, mask = jax.tree.map(lambda leaf: leaf[1:2], operands)
    got, _ = layer.run(layer.params, hidden, position, dataclasses.replace(staged, cache=None), mask)
    close(got, tree.wanted[1:2, 3:])


def test_nonfinite_numbers_reach_only_what_reads_them(layer, tree):
    """Nodes of trees, tokens of chains, and the cache of the last row. The rest is the same to the last bit.

    What reads them is what changes with them while they are finite: it ends where a mixer reads only a few tokens.
    """

    def in_last_row(number):
        def change(leaf):
            leaf = np.array(leaf)
            if leaf.dtype.kind == "f":
                leaf[2] += np.float32(number)
            return leaf

        return jax.tree.map(change, tree.cache)

    def changed(hidden, first, second):
        hidden = hidden.copy()
        hidden[0, 3, 2] += np.float32(first)
        hidden[1, 4, 0] += np.float32(second)
        return hidden

    chain, position = hidden_states(CHUNK, 7), positions(LENGTHS, CHUNK)
    in_tree = np.stack([ANCESTORS[0, :, 3], ANCESTORS[1, :, 4], np.ones(NODES, bool)])
    in_chain = np.stack([np.arange(CHUNK) >= 3, np.arange(CHUNK) >= 4, np.ones(CHUNK, bool)])
    for hidden, run, may_read in (
        (tree.nodes, tree.run, in_tree),
        (chain, lambda chain, cache: layer.run(layer.params, chain, position, cache, Causal()), in_chain),
    ):
        want = np.asarray(run(hidden, tree.cache)[0])
        reads = np.any(np.asarray(run(changed(hidden, 1, 1), in_last_row(1))[0]) != want, axis=2)
        got = np.asarray(run(changed(hidden, np.nan, np.inf), in_last_row(np.nan))[0])
        is_finite = np.isfinite(got).all(2)
        assert reads[0, 3] and reads[1, 4] and reads[2, 0]
        assert not np.any(is_finite & reads) and not np.any(~is_finite & ~may_read)
        np.testing.assert_array_equal(is_finite[:2], ~reads[:2])
        np.testing.assert_array_equal(got[~may_read], want[~may_read])


@pytest.mark.quick_cases(4)
def test_bfloat16_gives_the_same_roughly(layer, tree):
    """Weights and tokens that bfloat16 holds exactly; what it rounds is in between."""
    half = lambda leaf: np.asarray(leaf).astype(jnp.bfloat16)
    params, following = jax.tree.map(half, layer.params), half(hidden_states(CHUNK, 6))
    cache = jax.tree.map(lambda leaf, like: np.asarray(leaf).astype(like.dtype), tree.cache, layer.empty(jnp.bfloat16))
    got, _ = layer.run(params, following, positions(LENGTHS, CHUNK), cache, Causal())
    assert got.dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    for row in range(BATCH):
        text = np.concatenate([tree.prefix[row, : LENGTHS[row]], following[row].astype(np.float32)])
        close(np.asarray(got[row], np.float32), layer.whole(text, rounded)[-CHUNK:], ROUGHLY)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_cost_grows_with_the_tokens_that_its_cache_holds(name):
    """What a cache of a fixed size stands for costs nothing; a window reads no more than itself."""
    config, (near, far) = EXAMPLES[name], (2000, 3000)
    caches = (jax.eval_shape(partial(config.empty_cache, 1, capacity, jnp.float32)) for capacity in (near, far))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(cache)) for cache in caches]
    one, other = (config.mixing_cost(1, cached) for cached in (near, far))
    grows, window = sizes[1] > sizes[0], getattr(config, "window", None)
    if grows and window is None:
        per_token = (other.flops - one.flops) / (far - near)
        assert (one.num_read, other.num_read) == (near, far) and per_token > 0
        assert one.flops == pytest.approx((near + 1) * per_token)
        assert per_token >= 4 * one.num_heads * one.value_size  # a score and a weighted value, at least
    else:
        assert one == other and one.num_read == (window or 0) and one.flops > 0
    assert (one.num_heads > 0) == grows


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("num_new", [1, 128])
def test_it_says_what_kernel_runs_and_why(name, num_new):
    found = EXAMPLES[name].kernel(3, num_new, 256, jnp.bfloat16)
    assert found.implementation == "xla" and found.reason


class OtherPolicy(KVCache):
    """A policy that is none of the library's."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_cache_policy_is_honoured_or_the_reason_given(name):
    config = EXAMPLES[name]
    assert config.unsupported_policy_reason(KVCache) is None and config.unsupported_policy_reason(MarkedCache) is None
    if isinstance(config.empty_cache(1, 3, jnp.float32), MarksTokens):
        assert config.empty_cache(1, 3, jnp.float32, MarkedCache).marks_tokens
    else:
        with pytest.raises(ValueError, match="use a method that skips no layers"):
            config.empty_cache(1, 3, jnp.float32, MarkedCache)
    reason = config.unsupported_policy_reason(OtherPolicy)
    made = jax.tree.leaves(config.empty_cache(1, 3, jnp.float32, OtherPolicy), is_leaf=lambda x: type(x) is OtherPolicy)
    assert (reason is None) == any(type(cache) is OtherPolicy for cache in made)
    block = pre_norm_block(config, GatedMLPConfig(5), RMSNormConfig(1e-5))
    model = Model(ModelConfig(7, WIDTH, 64, (block,), RMSNormConfig(1e-5), tie_embeddings=True))
    if reason is not None:
        with pytest.raises(ValueError, match=f"cache_policy OtherPolicy would change no layer of this model: {reason}"):
            model.empty_cache(1, 3, jnp.float32, OtherPolicy)
        attending = pre_norm_block(EXAMPLES["gqa, all tokens"], GatedMLPConfig(5), RMSNormConfig(1e-5))
        mixed = dataclasses.replace(model.config, blocks=(block, attending))
        assert type(Model(mixed).empty_cache(1, 3, jnp.float32, OtherPolicy)[1]) is OtherPolicy


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_invariant_mode_gives_the_same_bits_or_is_refused(name):
    """Tokens one by one, and all in one forward."""
    block = pre_norm_block(EXAMPLES[name], GatedMLPConfig(5), RMSNormConfig(1e-5))
    config = ModelConfig(7, WIDTH, 64, (block,), RMSNormConfig(1e-5), tie_embeddings=True)
    reason = EXAMPLES[name].invariant_unsupported_reason()
    if reason is not None:
        with pytest.raises(ValueError, match=f"this model has no invariant mode: {reason}: use invariant=False"):
            Model(config, invariant=True)
        return
    model = Model(config, invariant=True)
    params, tokens, run = model.init(jax.random.key(0)), jnp.array([[3, 1, 6, 2]]), jax.jit(model.apply)
    whole, caches = run(params, tokens, positions(0, 4)).hidden, model.empty_cache(1, 8, jnp.float32)
    for place in range(4):
        out = run(params, tokens[:, place : place + 1], positions(place, 1), caches)
        np.testing.assert_array_equal(out.hidden[:, 0], whole[:, place])
        caches = tuple(cache.commit(new, jnp.array([1])) for cache, new in zip(caches, out.cache_updates, strict=True))


def test_a_mixer_or_a_cache_that_lacks_methods_is_refused():
    """Where it is used first, with the names of what is missing."""

    class Bare:
        length = capacity = 0

    class Careless(type(EXAMPLES["mfa"])):
        def empty_cache(self, *sizes, **options):
            return Bare()

    def model_with(mixer):
        block = pre_norm_block(EXAMPLES["mfa"], GatedMLPConfig(5), RMSNormConfig(1e-5))
        object.__setattr__(block.mixer, "layer", mixer)  # which no annotation checks, as outside these tests
        return Model(ModelConfig(7, WIDTH, 64, (block,), RMSNormConfig(1e-5), tie_embeddings=True))

    with pytest.raises(ValueError, match=r"the mixer GatedMLPConfig lacks empty_cache, .*unsupported_policy_reason of"):
        model_with(GatedMLPConfig(5))
    mfa = EXAMPLES["mfa"]
    careless = Careless(**{field.name: getattr(mfa, field.name) for field in dataclasses.fields(mfa)})
    with pytest.raises(ValueError, match="the cache Bare lacks commit, empty_like of KeptCache: add them"):
        model_with(careless).empty_cache(1, 8, jnp.float32)


def test_a_part_of_a_cache_is_refused_in_the_invariant_mode():
    tile = Tile(None, None, None, 1, 1, True)
    with pytest.raises(ValueError, match="has no invariant mode: its `invariant_unsupported_reason` must say so"):
        part(tile, lambda cache: cache, lambda update: update)
