"""A model in pipeline stages equals the model on one device, in every scheme, and sends only hidden states."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.drafters import DraftModel
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.attention.mask import Ancestors
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.config import ModelConfig
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model, commit
from decodax.planning.hlo import collectives_of
from decodax.sharding.mesh import read_mesh
from decodax.sharding.pipeline import Pipeline
from decodax.sharding.rules import place_tree
from tests.golden_files import load_golden
from tests.odd_drafters import RandomTrees
from tests.sharding import wide
from tests.tiny import NORM

FOUR, TWO, EIGHT = "pipeline=4,tensor=2", "data=2,pipeline=2,tensor=2", "data=2,pipeline=4"
PLAIN = Pipeline()
# All-reduces add in another order than one device: a few roundings of numbers of about 1, over a few layers.
LOGITS_TOLERANCE = 1e-4


def cases(*quick):
    """Every model on every mesh, in one chunk of layers a stage and in two; of those only the quick ones by default."""
    return wide.runnable(
        [
            pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
            for case in itertools.product(wide.LAYERS, (FOUR, TWO, EIGHT), (1, 2))
        ]
    )


def num_stages(mesh):
    return 2 if mesh == TWO else 4


def blocks_of(kind, repeats):
    """The kind's pair of layers, repeated; for "mla" the second, after a first layer of another kind (DeepSeek)."""
    pair = wide.blocks_of(kind)
    return pair[:1] + pair[1:] * repeats if kind == "mla" else pair * repeats


@cache
def model_of(kind, repeats, mesh=None, pipeline=PLAIN, **execution):
    config = ModelConfig(wide.VOCABULARY, wide.WIDTH, 512, blocks_of(kind, repeats), NORM, tie_embeddings=False)
    if mesh is None:
        return Model(config)
    return Model(config, execution=Execution(mesh=fit_mesh(read_mesh(mesh), config), pipeline=pipeline, **execution))


@cache
def params_of(kind, repeats):
    """All random, and small: layers whose sums nearly cancel would amplify rounding."""
    random = np.random.default_rng(1)

    def draw(path, weight):
        size = 0.1 if len(weight.shape) == 1 else 0.6 * weight.shape[-1] ** -0.5
        size = size / repeats if path[-1].key in ("out", "down") else size
        return jnp.asarray((weight.init == "ones") + size * random.standard_normal(weight.shape), jnp.float32)

    weights = model_of(kind, repeats).config.weights()
    return jax.tree_util.tree_map_with_path(draw, weights, is_leaf=lambda leaf: isinstance(leaf, Weight))


def on_mesh(model, params):
    execution = model.execution
    return place_tree(execution.mesh, execution.rules, model.stacked(params), model.weights())


def in_stages(kind, mesh, chunks, micro_batches=None):
    """A model with as many repeats as stages and chunks need, and its parameters."""
    repeats = num_stages(mesh) * chunks
    model = model_of(kind, repeats, mesh, Pipeline(chunks, micro_batches))
    return model, on_mesh(model, params_of(kind, repeats))


@cache
def single_logits(kind, repeats):
    return np.asarray(wide.full_logits(model_of(kind, repeats), params_of(kind, repeats)))


@cache
def single_tokens(kind, repeats):
    """The tokens of plain decoding on one device."""
    model, params = model_of(kind, repeats), params_of(kind, repeats)
    return np.asarray(jax.jit(decoding.autoregressive(model))(params, wide.start(model, params)).tokens)


@pytest.mark.parametrize(
    ("kind", "mesh", "chunks"), cases(("dense", FOUR, 1), ("moe", TWO, 2), ("mla", FOUR, 1), ("linear", TWO, 2))
)
@pytest.mark.quick_cases(1)
def test_logits(kind, mesh, chunks):
    model, params = in_stages(kind, mesh, chunks, micro_batches=4)
    wanted = single_logits(kind, num_stages(mesh) * chunks)
    np.testing.assert_allclose(wide.full_logits(model, params), wanted, atol=LOGITS_TOLERANCE, rtol=0)


@cache
def decode_program(kind, mesh, chunks):
    """The compiled loop of plain decoding, its parameters, and a state to start with, which it donates."""
    model, params = in_stages(kind, mesh, chunks, micro_batches=4)
    state = wide.start(model, params)
    return jax.jit(decoding.autoregressive(model), donate_argnums=1).lower(params, state).compile(), params, state


@pytest.mark.parametrize(("kind", "mesh", "chunks"), cases(("dense", TWO, 2), ("blocks", FOUR, 1)))
def test_plain_decoding(kind, mesh, chunks):
    """The caches stay on the stages of their layers."""
    program, params, state = decode_program(kind, mesh, chunks)
    places = [leaf.sharding for leaf in jax.tree.leaves(state.caches)]
    out = program(params, jax.tree.map(jnp.copy, state))
    assert [leaf.sharding for leaf in jax.tree.leaves(out.caches)] == places
    np.testing.assert_array_equal(out.tokens, single_tokens(kind, num_stages(mesh) * chunks))


@pytest.mark.parametrize(("kind", "mesh", "chunks"), cases(("moe", TWO, 1), ("linear", TWO, 1)))
@pytest.mark.slow
def test_speculative_decoding(kind, mesh, chunks):
    """Another tree in every row and round, whose nodes are mostly plain decoding's tokens."""
    model, params = in_stages(kind, mesh, chunks, micro_batches=2)
    wanted = single_tokens(kind, num_stages(mesh) * chunks)
    decode = jax.jit(decoding.speculative(model, RandomTrees(capture=(), model=model), ExactMatch()), donate_argnums=2)
    out = decode(params, model.execution.replicated(jnp.asarray(wanted)), wide.start(model, params))
    np.testing.assert_array_equal(out.tokens, wanted)
    assert out.counts.accepted.sum() > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", wide.LAYERS)
@pytest.mark.parametrize("staged", [False, True])
def test_a_draft_model(kind, staged):
    """The draft is replicated; or it runs in stages too, with its updates staged beside stacked caches."""
    model, params = in_stages(kind, TWO, 2)
    draft, draft_params = model, params
    if not staged:
        draft, draft_params = wide.draft_model(kind, model), model.execution.replicated(params_of(kind, 4))
    decode = jax.jit(decoding.speculative(model, DraftModel.top_k(draft, (-1, 0, 1)), ExactMatch()))
    out = decode(params, draft_params, wide.start(model, params))
    np.testing.assert_array_equal(out.tokens, single_tokens(kind, 4))
    # It is the target itself: the greedy rows, half of them, accept every draft of 2 tokens.
    assert out.counts.accepted_lengths[2] >= wide.NUM_ROWS // 2 * (wide.NEW // 3)


@pytest.mark.parametrize("kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mla", "linear"))])
@pytest.mark.slow
def test_staged_tokens(kind):
    """A token after two staged ones, after five in the stacked cache of their layer."""

    def last_logits(model, params):
        tokens = jnp.asarray(wide.PROMPTS[:, :8], jnp.int32)
        position = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), tokens.shape)
        caches = model.empty_cache(wide.NUM_ROWS, 16, jnp.float32)
        prompt = model.apply(params, tokens[:, :5], position[:, :5], caches)
        caches = commit(caches, prompt.cache_updates, jnp.full(wide.NUM_ROWS, 5))
        drafts = model.apply(params, tokens[:, 5:7], position[:, 5:7], caches)
        room = place(model.empty_update(wide.NUM_ROWS, 3, jnp.float32), drafts.cache_updates, jnp.arange(2))
        staged_at = jnp.broadcast_to(jnp.arange(5, 8, dtype=jnp.int32), (wide.NUM_ROWS, 3))
        mask = Ancestors(jnp.array([[[True, True, False, True]]]))
        out = model.apply(params, tokens[:, 7:], position[:, 7:], stage(caches, room, staged_at), mask=mask)
        return model.logits(params, out.hidden)

    model, params = in_stages(kind, TWO, 1, micro_batches=4)
    wanted = jax.jit(partial(last_logits, model_of(kind, 2)))(params_of(kind, 2))
    np.testing.assert_allclose(jax.jit(partial(last_logits, model))(params), wanted, atol=LOGITS_TOLERANCE, rtol=0)


def test_between_stages_only_hidden_states_move():
    """In the decoding step's loop: a permute in each tick, a broadcast of the result, two all-reduces in each layer."""
    found = collectives_of(decode_program("dense", TWO, 2)[0].as_text())
    in_layers = [(one.layer, one.kind) for one in found if one.layer is not None]
    assert sorted(in_layers) == [(0, "all-reduce")] * 2 + [(1, "all-reduce")] * 2
    of_pipeline = [(one.kind, one.num_bytes) for one in found if one.layer is None and "shard_map" in one.operation]
    hidden_bytes = wide.NUM_ROWS // 2 * wide.WIDTH * 4  # on each of the two devices over which rows are split
    assert sorted(of_pipeline) == [("all-reduce", hidden_bytes), ("collective-permute", hidden_bytes // 4)]
    assert max(one.num_bytes for one in found) == hidden_bytes


@pytest.mark.parametrize(
    ("mesh", "chunks"), [(TWO, 2), *(pytest.param(FOUR, chunks, marks=pytest.mark.slow) for chunks in (1, 2))]
)
def test_a_device_holds_the_layers_and_caches_of_its_stage(mesh, chunks):
    program, params, state = decode_program("dense", mesh, chunks)
    blocks = {name: block for name, block in params.items() if name.startswith("blocks_")}
    for leaf in jax.tree.leaves((state.caches, blocks)):
        assert leaf.shape[0] == num_stages(mesh) * chunks
        stages = {}
        for shard in leaf.addressable_shards:
            assert shard.data.shape[0] == chunks
            stages.setdefault(shard.index[0].start or 0, set()).add(shard.device)
        assert sorted(stages) == list(range(0, leaf.shape[0], chunks))
        assert sum(map(len, stages.values())) == len(set.union(*stages.values())) == 8
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.caches))
    assert program.memory_analysis().alias_size_in_bytes >= held  # written in place


@pytest.mark.parametrize("num_rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_that_do_not_divide_make_fewer_micro_batches(num_rows):
    """One row is one micro-batch; three rows over two groups of devices are replicated."""
    model, params = in_stages("dense", TWO, 2)
    tokens = jnp.asarray(wide.PROMPTS[:num_rows, :16], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)
    logits = jax.jit(lambda params: model.logits(params, model.apply(params, tokens, position).hidden))(params)
    np.testing.assert_allclose(logits, single_logits("dense", 4)[:num_rows], atol=LOGITS_TOLERANCE, rtol=0)


def test_a_folder_is_loaded_into_stages():
    """DeepSeek-V3's first layer is of another kind, and replicated."""
    golden = load_golden("deepseek_v3")
    lm = decodax.load(golden.folder, mesh="pipeline=2,data=4")
    assert lm.model.stages.before == 1 and lm.model.stages.chunk_layers == 1
    rows = np.arange(12).reshape(4, 3)
    wanted = decodax.logits(decodax.load(golden.folder), rows)
    np.testing.assert_allclose(decodax.logits(lm, rows), wanted, atol=LOGITS_TOLERANCE, rtol=0)


def test_fresh_parameters_are_stacked():
    model = model_of("dense", 4, FOUR)
    described = jax.tree.map(
        lambda weight: weight.shape, model.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight)
    )
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(3)))
    assert jax.tree.map(lambda leaf: leaf.shape, fresh) == described
    assert fresh["blocks_1"]["mixer"]["out"].shape == (4, wide.WIDTH, 8 * 6)


def test_what_pipeline_stages_do_not_support():
    model, params = in_stages("dense", TWO, 1)
    tokens, position = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    for options in ({"layers": (0, 2)}, {"capture": (1,)}):
        with pytest.raises(NotImplementedError, match="runs all its 4 layers at once, and gives hidden"):
            model.apply(params, tokens, position, **options)
    captured = jax.jit(lambda params: model.apply(params, tokens, position, capture=(0, 4)))(params)
    np.testing.assert_array_equal(captured.captured[4], captured.hidden)
    with pytest.raises(NotImplementedError, match="the invariant mode does not run in pipeline stages"):
        Model(model.config, invariant=True, execution=model.execution).apply(params, tokens, position)
    with pytest.raises(ValueError, match="caches must have the 2 entries of `empty_cache`, got 4"):
        model.apply(params, tokens, position, model_of("dense", 2).empty_cache(2, 16, jnp.float32))
    many = model_of("dense", 2, TWO, Pipeline(micro_batches=3))
    with pytest.raises(ValueError, match=r"4 rows \(of a batch.*do not divide into micro_batches=3"):
        wide.full_logits(many, params)
    with pytest.raises(ValueError, match="6 layers do not divide into 4 pipeline stages"):
        _ = model_of("dense", 3, FOUR).stages


def test_prompts_with_nonfinite_hidden_states_fail_alone():
    """Prefill checks the hidden states that come out of the stages."""
    model, params = in_stages("dense", TWO, 1, micro_batches=2)
    nonfinite = dict(params, embedding=params["embedding"].at[7].set(np.nan))
    tokens = np.array([[1, 2, 3], [1, 7, 3], [4, 5, 6], [6, 5, 7]])
    state = decoding.prefill(model, nonfinite, tokens, np.full(4, 3), 2, np.arange(4), stop_token_ids=(-1,))
    assert np.asarray(state.failed).tolist() == [False, True, False, False]
    assert np.asarray(state.caches[0].length).tolist() == [2, 0, 2, 2]
