"""A package from outside, installed with pip, provides methods that work, on one device and on eight.

Its source is in `outside/`. Nothing of decodax is changed or registered for it. The rules of each contract are tested
in `tests/contracts/`, for its methods as for decodax's own.
"""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from decodax import decoding
from decodax.core import pytree
from decodax.core.weight import Weight
from decodax.decoding.drafters import Drafter, Recording, Replay, fixed_proposal
from decodax.decoding.early_exit import AllLayers
from decodax.decoding.logits_processors import History
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.contract import Cache, CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model
from decodax.sharding.constraints import shardings
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES, place_tree
from tests.imports import imports_of, sources
from tests.speculation import (
    LENGTHS,
    MODEL,
    NEW,
    NO_STOPS,
    PARAMS,
    PROMPTS,
    VOCABULARY,
    plain,
    plain_decode,
    start,
    texts,
)
from tests.tiny import NORM

SOURCE = Path(__file__).parent / "outside"
DECAY = 0.5


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The installed package: not a file of this repository."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    install = [*pip, "install", "--no-deps", "--no-index", "--no-cache-dir", "--target", str(target), str(SOURCE)]
    subprocess.run(install, check=True, timeout=300)
    sys.path.insert(0, str(target))
    try:
        module = importlib.import_module("own_methods")
        assert Path(module.__file__).is_relative_to(target)
        yield module
    finally:
        sys.path.remove(str(target))
        for name in [name for name in sys.modules if name.split(".")[0] == "own_methods"]:
            sys.modules.pop(name)


def run(drafter, verifier, draft_params=None, **options):
    decode = jax.jit(decoding.speculative(MODEL, drafter, verifier), donate_argnums=2)
    return decode(PARAMS, draft_params, start(**options))


def test_the_drafter(plugin):
    """Output is plain decoding's, drafts are accepted, and its own state follows from the whole text."""
    state = run(plugin.LastSuccessor(3, VOCABULARY), ExactMatch())
    np.testing.assert_array_equal(state.tokens, plain().tokens)
    np.testing.assert_allclose(state.logprobs, plain().logprobs, atol=2e-5)
    assert np.asarray(state.counts.accepted_lengths)[1:].sum() > 3
    want = np.zeros((3, VOCABULARY), int)
    for row, text in enumerate(texts(state)):
        for place in range(1, len(text)):
            want[row, text[place - 1]] = place
    np.testing.assert_array_equal(state.draft.place, want)


def test_the_verifier(plugin):
    """Greedy rows are plain decoding's; sampled ones accept every draft among all tokens, and fewer among some."""
    recording = recording_of_plain()
    greedy = run(Replay(4, VOCABULARY), plugin.AmongTopTokens(), recording)
    np.testing.assert_array_equal(greedy.tokens, plain().tokens)
    rates = []
    for count in (3, VOCABULARY):
        counts = run(Replay(4, VOCABULARY), plugin.AmongTopTokens(count), recording, options="sampled").counts
        rates.append(int(counts.accepted.sum()) / int(counts.proposed.sum()))
    assert 0 < rates[0] < rates[1] < 1  # the first row is greedy


def recording_of_plain(wrong_rate=0.3):
    return Recording.create(np.asarray(plain().tokens), wrong_rate=wrong_rate)


def watched(plugin):
    """A policy whose cache is the plugin's, with two more beside it, written by the same commits.

    One keeps keys and values unchanged, the other is recurrent: its state is DECAY x itself + key, token by token.
    """

    @pytree.dataclass
    class Watched:
        small: plugin.Int8Cache
        rows: KVCache
        recurrent: jax.Array

        @classmethod
        def empty(cls, batch_size, num_kv_heads, capacity, head_size, dtype):
            sizes = (batch_size, num_kv_heads, capacity, head_size, dtype)
            recurrent = jnp.zeros((batch_size, num_kv_heads, head_size))
            return cls(plugin.Int8Cache.empty(*sizes), KVCache.empty(*sizes), recurrent)

        length = property(lambda self: self.small.length)
        capacity = property(lambda self: self.small.capacity)

        def empty_like(self):
            return jax.tree.map(jnp.zeros_like, self)

        def read(self, begin, num_tokens):
            return self.small.read(begin, num_tokens)

        def commit(self, rows, count, path=None):
            keys, recurrent = rows.key, self.recurrent
            if path is not None:
                keys = jnp.take_along_axis(keys, path[:, None, :, None], axis=2)
            for token in range(keys.shape[2]):
                is_taken = (token < count)[:, None, None]
                recurrent = jnp.where(is_taken, DECAY * recurrent + keys[:, :, token], recurrent)
            small, whole = (cache.commit(rows, count, path) for cache in (self.small, self.rows))
            return Watched(small, whole, recurrent)

    return Watched


@dataclasses.dataclass(frozen=True)
class Forked(Drafter):
    """A chain as a tree, in which every node has an earlier sibling with another token."""

    chain: Replay
    num_nodes = property(lambda self: 2 * self.chain.num_tokens + 1)
    max_depth = property(lambda self: self.chain.num_tokens)

    def start(self, params, draft_params, state):
        return self.chain.start(params, draft_params, state)

    def propose(self, params, draft_params, state):
        proposal, draft = self.chain.propose(params, draft_params, state)
        token, is_candidate = (jnp.repeat(x, 2, axis=1)[:, 1:] for x in (proposal.token, proposal.is_candidate))
        token = token.at[:, 1::2].add(1) % VOCABULARY
        tree = decoding.Tree.fixed([-1, *(2 * (node // 2) for node in range(self.num_nodes - 1))])
        return fixed_proposal(tree, token, is_candidate), draft


def test_its_states_are_split_over_a_mesh(plugin):
    """By the axes that classes name, in annotations or where these do not say it."""
    mesh = read_mesh("data=2,context=2,tensor=2")
    found = lambda make: shardings(jax.eval_shape(make), mesh, RULES)
    cache = found(lambda: plugin.Int8Cache.empty(4, 2, 16, 5, jnp.float32))
    assert cache.key.spec == cache.value.spec == PartitionSpec("data", "tensor", "context", None)
    assert cache.key_scale.spec == cache.value_scale.spec == PartitionSpec("data", "tensor", "context")
    assert cache.length.spec == PartitionSpec("data")
    tail = found(lambda: plugin.TokenShift(8).empty_cache(4, 16, jnp.float32)).tail
    features = found(lambda: plugin.TokenShift(8).empty_update(4, 2, jnp.float32)).features
    assert tail.spec == PartitionSpec("data", None, "tensor")
    assert features.spec == PartitionSpec("data", None, "tensor")
    successors = found(lambda: plugin.last_successor.Successors(jnp.zeros((4, 6), jnp.int32)))
    assert successors.place.spec == PartitionSpec("data", "tensor")
    assert found(lambda: plugin.LastTokenPenalty(jnp.zeros(4))).penalty.spec == PartitionSpec("data")


@pytest.mark.parametrize("drafter", [Replay(4, VOCABULARY), Forked(Replay(3, VOCABULARY))], ids=["chain", "tree"])
@pytest.mark.quick_cases(1)
def test_the_cache_policy(plugin, drafter):
    """Nothing of a rejected node reaches the small cache or a recurrent state, bit for bit.

    Every layer's small cache holds, bit for bit, the quantised keys and values of accepted tokens. These are plain
    decoding's where they depend on the tokens alone (the first layer), and not in later layers: a draft token attends
    to earlier draft tokens unquantised, where plain decoding reads them quantised.
    """
    assert isinstance(plugin.Int8Cache, CachePolicy)
    policy = watched(plugin)
    want = plain_decode(PARAMS, start(cache_policy=policy))
    got = run(drafter, ExactMatch(), recording_of_plain(), cache_policy=policy)
    assert isinstance(got.caches[0].small, Cache)
    np.testing.assert_array_equal(got.tokens, want.tokens)  # not guaranteed with a lossy cache, but true here
    assert int(got.num_target_forwards) < int(want.num_target_forwards)
    rejected = int(got.counts.proposed.sum()) - int(got.counts.accepted.sum())
    assert rejected > 10
    quantise = jax.jit(plugin.quantised_cache.quantised)
    for cache in got.caches:
        for row, length in enumerate(np.asarray(got.length) - 1):
            assert cache.small.length[row] == cache.rows.length[row] == length
            assert not np.asarray(cache.small.key_scale[row, :, length:]).any()
            recurrent = np.zeros(cache.recurrent.shape[1:])
            for token in range(length):
                recurrent = DECAY * recurrent + np.asarray(cache.rows.key[row, :, token], np.float64)
            # Keys of size up to 10, halved at every token.
            np.testing.assert_allclose(cache.recurrent[row], recurrent, atol=1e-5)
        for name in ("key", "value"):
            integers, scale = quantise(getattr(cache.rows, name))
            np.testing.assert_array_equal(getattr(cache.small, name), integers)
            np.testing.assert_array_equal(getattr(cache.small, f"{name}_scale"), scale)
    for name in ("key", "value"):
        mine, theirs = (state.caches[0].small for state in (got, want))
        # The same sums over 23 features, whose order may depend on how many tokens a forward has.
        np.testing.assert_allclose(getattr(mine, f"{name}_scale"), getattr(theirs, f"{name}_scale"), rtol=1e-6)
        difference = np.abs(np.asarray(getattr(mine, name), int) - np.asarray(getattr(theirs, name), int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_the_logits_processor(plugin):
    """Its formula; and drafts are verified with it: the output is plain decoding's, and other than without it."""
    own = plugin.LastTokenPenalty(jnp.array([0.5, 2.0]))
    history = History(None, None, jnp.zeros(2, jnp.int32), jnp.array([[2, 1, 0], [0, 9, 9]]), jnp.array([2, 1]))
    np.testing.assert_array_equal(own(jnp.array([[4.0, 3, 1]] * 2), history), [[4, 2.5, 1], [2, 3, 1]])
    own = plugin.LastTokenPenalty(jnp.full(3, 9.0))
    sizes, sampling = (LENGTHS, NEW, np.arange(3)), decoding.Sampling.create(3, VOCABULARY, logits_processors=[own])
    begun = lambda: decoding.prefill(MODEL, PARAMS, PROMPTS, *sizes, sampling=sampling, stop_token_ids=NO_STOPS)
    drafted = decoding.speculative(MODEL, plugin.LastSuccessor(3, VOCABULARY), ExactMatch())
    want, got = plain_decode(PARAMS, begun()), jax.jit(drafted)(PARAMS, None, begun())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert np.any(np.asarray(got.tokens) != plain().tokens)
    assert int(got.num_target_forwards) < int(want.num_target_forwards)


def test_the_layer_policy(plugin):
    """With one layer from the start, tokens are those of a model that has only that layer."""
    layer_policy = plugin.FirstLayers(1, full_tokens=0)
    decode = jax.jit(decoding.speculative(MODEL, Replay(4, VOCABULARY), ExactMatch(), layer_policy))
    got = decode(PARAMS, recording_of_plain(), start(layer_policy=layer_policy))
    shallow = Model(dataclasses.replace(MODEL.config, blocks=MODEL.config.blocks[:1]))
    params = {name: PARAMS[name] for name in shallow.config.weights()}
    sizes = (LENGTHS, NEW, np.arange(3))
    want = decoding.prefill(shallow, params, PROMPTS, *sizes, stop_token_ids=NO_STOPS)
    want = jax.jit(decoding.autoregressive(shallow))(params, want)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert np.any(np.asarray(got.tokens) != plain().tokens)
    np.testing.assert_array_equal(got.layer_counts.row.sum(), got.counts.accepted_lengths.sum())
    with pytest.raises(ValueError, match=r"num_layers must be in 1\.\.2, got 3"):
        start(layer_policy=plugin.FirstLayers(3, full_tokens=0))


HEADS = GQAConfig(4, 4, 6, Rope(6, 1e4), scale=0.4)


def model_on(mesh, *mixers):
    """A model of these mixers and its parameters, on one device or a mesh."""
    blocks = tuple(pre_norm_block(mixer, GatedMLPConfig(16), NORM) for mixer in mixers)
    config = ModelConfig(19, 12, 512, blocks, NORM, tie_embeddings=False)
    model = Model(config) if mesh is None else Model(config, execution=Execution(mesh=read_mesh(mesh)))
    random = np.random.default_rng(1)

    def draw(weight):
        return (random.standard_normal(weight.shape) * 2 * weight.shape[-1] ** -0.5).astype(np.float32)

    params = jax.tree.map(draw, config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))
    return model, params if mesh is None else place_tree(model.execution.mesh, RULES, params, config.weights())


def decoded(plugin, kind, mesh):
    """The state after a few tokens of four rows, two of them sampled, with the package's method of this kind."""
    model, params = model_on(mesh, *((plugin.TokenShift(8), HEADS) if kind == "mixer" else (HEADS, HEADS)))
    prompts, lengths = np.random.default_rng(0).integers(0, 7, (4, 9)), np.array([9, 3, 1, 6])
    own = [plugin.LastTokenPenalty(jnp.array([5.0, 0.0, 3.0, 0.0]))] if kind == "logits processor" else []
    sampling = decoding.Sampling.create(4, 19, temperature=[0.0, 0.8] * 2, logits_processors=own)
    layer_policy = plugin.FirstLayers(1, full_tokens=4) if kind == "layer policy" else AllLayers()
    policy = plugin.Int8Cache if kind == "cache policy" else None
    sizes = (lengths, 11, np.arange(4))
    options = {"sampling": sampling, "stop_token_ids": NO_STOPS, "layer_policy": layer_policy, "cache_policy": policy}
    state = decoding.prefill(model, params, prompts, *sizes, **options)
    verifier = plugin.AmongTopTokens() if kind == "verifier" else ExactMatch()
    return jax.jit(decoding.speculative(model, plugin.LastSuccessor(2, 19), verifier, layer_policy))(
        params, None, state
    )


# What of a state is split over devices because of what a method declares.
SPLIT = {
    "drafter": lambda state: state.draft.place,
    "verifier": lambda state: state.tokens,
    "logits processor": lambda state: state.sampling.processors[0].penalty,
    "layer policy": lambda state: state.layer_counts.row,
    "cache policy": lambda state: state.caches[1].key_scale,
    "mixer": lambda state: state.caches[0].tail,
}


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.quick_cases(1)
def test_eight_devices_give_what_one_gives(plugin, kind):
    """Rows over two, heads and features over four."""
    want, got = (decoded(plugin, kind, mesh) for mesh in (None, "data=2,tensor=4"))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # Logits of about 5, from sums of at most 16 float32 numbers in another order, over two layers.
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    np.testing.assert_array_equal(got.counts.accepted, want.counts.accepted)
    np.testing.assert_array_equal(got.layer_counts.row, want.layer_counts.row)
    assert int(got.counts.accepted.sum()) > 0
    assert not SPLIT[kind](got).sharding.is_fully_replicated


def test_it_imports_only_public_names():
    """No module and no name that begins with an underscore."""
    modules, files = sources(), sorted((SOURCE / "own_methods").glob("*.py"))
    found = [own for path in files for own in imports_of(path.stem, path.read_text("utf-8"), modules)]
    assert len(found) > 20
    parts = {own.place: (*own.target.split("."), own.name or "") for own in found}
    assert [place for place, names in parts.items() if any(name.startswith("_") for name in names)] == []
