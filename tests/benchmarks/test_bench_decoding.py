"""The decoding benchmark runs at a tiny size, refuses schemes with other tokens, and writes what it measured."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from benchmarks import _bench_agreement as agreement
from benchmarks import _bench_auxiliary as auxiliary
from benchmarks import _bench_common as common
from benchmarks import _bench_precision as precision
from benchmarks import _bench_repetition as repetition
from benchmarks import _bench_schemes as schemes
from benchmarks import _bench_sizes as sizes
from benchmarks import _bench_trees as trees
from benchmarks import _bench_typical as typical
from benchmarks import bench_decoding
from benchmarks._bench_runs import Runner, Scheme, row_rounds
from benchmarks._bench_world import World, deal
from benchmarks.bench_decode import SHAPES
from decodax.decoding.drafters import METHODS as DRAFTERS
from decodax.decoding.drafters import Children, MTPHead, NoDraft, Replay
from decodax.decoding.early_exit import METHODS as LAYER_POLICIES
from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.verifiers import METHODS as VERIFIERS
from decodax.decoding.verifiers import ExactMatch
from decodax.models.load import LanguageModel

pytestmark = pytest.mark.slow

SIZE = bench_decoding.QUICK
NEW, CAPACITY = SIZE.schemes.num_new, SIZE.schemes.capacity


@pytest.fixture(scope="module", autouse=True)
def programs_are_compiled_once():
    """Runners of equal schemes share their programs: these tests spend their time on compiling."""
    make, compile_ = Runner.__init__, Runner.compile
    starts, loops = {}, {}

    def kind(runner):
        return runner.model, runner.scheme.drafter, runner.scheme.verifier, runner.scheme.layer_policy

    def make_like_an_equal_one(self, *arguments, **sizes):
        make(self, *arguments, **sizes)
        self._start = starts.setdefault(kind(self), self._start)

    def compile_once(self, state):
        leaves, structure = jax.tree.flatten((self.params, self.scheme.draft_params, state))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        known = (*kind(self), structure, shapes)
        if known not in loops:
            loops[known] = compile_(self, state), self._compiled
        self.compile_seconds, self._compiled = loops[known]
        return self.compile_seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "__init__", make_like_an_equal_one)
        patch.setattr(Runner, "compile", compile_once)
        yield


def language_model(path, shape: common.Shape, seed: int) -> LanguageModel:
    model = shape.model()
    return LanguageModel(model, model.config, common.random_params(model, seed=seed), None, path, ())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    shape = SHAPES["tiny"]
    folder = tmp_path_factory.mktemp("models")
    lm = language_model(folder / "target", shape, 0)
    draft = language_model(folder / "draft", dataclasses.replace(shape, num_layers=1), 0)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, shape.vocab_size, size).astype(np.int32) for size in (7, 3, 11, 5)]
    windows = [random.integers(0, shape.vocab_size, (2, 18)).astype(np.int32) for _ in range(2)]
    return World(lm, draft, prompts, *windows)


@pytest.fixture(scope="module")
def shipped():
    """The embedded model, which has auxiliary weights, with prompts and windows of random tokens."""
    lm = decodax.load(dtype="float32")
    random = np.random.default_rng(0)
    prompts = [random.integers(0, lm.config.vocab_size, size).astype(np.int32) for size in (7, 3, 11, 5)]
    windows = [random.integers(0, lm.config.vocab_size, (5, 14)).astype(np.int32) for _ in range(2)]
    return World(lm, None, prompts, *windows)


@pytest.fixture(scope="module")
def plain(world):
    runner = Runner(world.lm.model, world.lm.params, Scheme(schemes.PLAIN), capacity=CAPACITY, num_new=NEW)
    return agreement.plain_steps(runner, world.prompts)


def logits_of(world, tokens):
    """Logits of one row, padded to one length so that one program serves all; later tokens change no earlier logits."""
    padded = jnp.asarray(np.pad(tokens, (0, CAPACITY - len(tokens)))[None], jnp.int32)
    return full_forward(world.lm.model, world.lm.params, padded)[1][0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, params, tokens):
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    out = model.apply(params, tokens, position, capture=(1, 2))
    return out, model.logits(params, out.hidden)


def test_every_verifier_drafter_and_layer_policy_is_measured(world):
    found = schemes.all_schemes(world)
    assert {type(scheme.verifier) for scheme in found.values() if scheme.verifier} == set(VERIFIERS.values())
    lm, skipping = decodax.load(dtype="float32"), decodax.load(dtype="float32", adapter="layer_skip")
    tried = [scheme for _, _, scheme in auxiliary.settings(lm, skipping, SIZE.auxiliary)]
    drafters = {type(scheme.drafter) for scheme in (*found.values(), *tried) if scheme.drafter}
    assert drafters == set(DRAFTERS.values()) - {Replay, MTPHead}  # neither model here has an MTP head
    assert {type(scheme.layer_policy) for scheme in tried} == set(LAYER_POLICIES.values())
    kinds = {scheme.drafter.children for scheme in found.values() if scheme.drafter}
    assert kinds == set(Children)


def test_schemes_part_and_its_picture(world, tmp_path, monkeypatch):
    wanted = (schemes.PLAIN, "prompt_lookup", "draft_model")
    named = {name: scheme for name, scheme in schemes.named_schemes(world).items() if name in wanted}
    monkeypatch.setattr(schemes, "all_schemes", lambda world: named)
    path = tmp_path / "result.json"
    path.write_text('{"loop": {"kept": 1}}')
    bench_decoding.run(["schemes"], world, SIZE, path, tmp_path / "images")
    result = json.loads(path.read_text())
    part = result["schemes"]
    assert result["loop"] == {"kept": 1} and part["date"] and part["versions"]["jax"]
    assert set(part["schemes"]) == set(part["gate"]) == set(part["speed"]["batch 2, greedy"]) == set(wanted)
    draft = part["schemes"]["draft_model"]
    assert draft["trained_parameters"] * 4 == draft["draft_params_bytes"] > 0 < draft["draft_state_bytes"]
    assert part["schemes"]["prompt_lookup"]["trained_parameters"] == 0
    for name in wanted:
        assert part["gate"][name]["passes"] and part["gate"][name]["rows"] == len(world.prompts)
        assert 1 <= part["schemes"][name]["greedy"]["tokens_per_forward"] <= NEW
    assert part["schemes"][schemes.PLAIN]["greedy"]["tokens_per_forward"] == 1
    assert set(part["compile"]) == set(wanted) - {schemes.PLAIN}
    assert 0 < part["teacher_forced"]["sampling"] < 1
    assert (tmp_path / "images" / "bench_decoding.png").stat().st_size > 0


def test_a_scheme_with_other_tokens_is_red_and_not_timed(world, monkeypatch):
    honest = Runner.trace

    def wrong(self, prompts, temperature=0.0, look=None):
        trace = honest(self, prompts, temperature, look)
        return trace if self.scheme.drafter is None else trace._replace(new=trace.new + 1)

    monkeypatch.setattr(Runner, "trace", wrong)
    named = schemes.named_schemes(world)
    setting = dataclasses.replace(SIZE.schemes, temperatures=(0.0,))
    result = schemes.measure(world, setting, {name: named[name] for name in (schemes.PLAIN, "prompt_lookup")})
    assert not result["gate"]["prompt_lookup"]["passes"]
    assert set(result["speed"]["batch 2, greedy"]) == {schemes.PLAIN}


def test_first_differences_are_ties_or_wrong(plain):
    same = agreement.compare(plain.new, plain)
    assert same.passes and same.same_rows == len(plain.new) and same.same_tokens == 1.0
    new = plain.new.copy()
    new[1, 3:] += 1
    new[2, NEW - 1] += 1
    gap = plain.gap.copy()
    gap[2, NEW - 1] = 0.9 * agreement.TIE * plain.largest[2, NEW - 1]
    found = agreement.compare(new, dataclasses.replace(plain, gap=gap))
    assert (found.same_rows, found.ties, found.wrong_rows) == (2, 1, 1)
    assert found.gaps == (float(gap[1, 3]), float(gap[2, NEW - 1]))
    assert found.same_tokens == (NEW + 3 + NEW - 1 + NEW) / (4 * NEW)
    with pytest.raises(ValueError, match="shape"):
        agreement.compare(new[:, 1:], plain)


def test_gaps_are_those_of_a_full_forward(world, plain):
    """Float32 in another order: 2 layers and a head, each within a few eps of logits of order 1."""
    for row, prompt in enumerate(world.prompts):
        logits = np.asarray(logits_of(world, np.concatenate([prompt, plain.new[row]])))[len(prompt) - 1 : -1]
        logits = np.sort(logits, axis=1)
        np.testing.assert_allclose(plain.gap[row], logits[:, -1] - logits[:, -2], atol=1e-4)
        np.testing.assert_allclose(plain.largest[row], np.abs(logits).max(axis=1), atol=1e-4)


def test_rounding_by_hand():
    """u = 2**-8, |g| = (1, 2), layers (3, 5) and (7, 11): 4 u (3 + 10 + 7 + 22), u sqrt(4/3 (9 + 100 + 49 + 484))."""
    gradient = jnp.array([[-1.0, 2.0]], jnp.bfloat16)
    streams = [jnp.array([[3.0, -5.0]], jnp.bfloat16), jnp.array([[-7.0, 11.0]], jnp.bfloat16)]
    assert float(jnp.finfo(jnp.bfloat16).eps) / 2 == 2**-8
    bound, spread = agreement.rounding(gradient, streams, 2**-8)
    np.testing.assert_array_equal(bound, [0.65625])
    np.testing.assert_allclose(spread, [(4 / 3 * 642) ** 0.5 / 256], rtol=1e-6)


def test_bound_uses_gradient_of_the_best_two(world, plain):
    """One forward by hand in float64: the gradient through the final norm, and the hidden states after each layer."""
    prompt, params = world.prompts[0], world.lm.params
    out, _ = full_forward(world.lm.model, params, jnp.asarray(prompt)[None])
    hidden = np.asarray(out.hidden, np.float64)[0, -1]
    head = np.asarray(params["head"], np.float64) * np.asarray(params["final_norm"]["weight"], np.float64)
    rms = np.sqrt(np.mean(hidden**2) + 1e-5)
    order = np.argsort(head @ hidden)
    towards = head[order[-1]] - head[order[-2]]
    gradient = towards / rms - hidden * (towards @ hidden) / (len(hidden) * rms**3)
    streams = sum(np.abs(np.asarray(out.captured[index], np.float64))[0, -1] for index in (1, 2))
    expected = 4 * 2.0**-24 * np.sum(np.abs(gradient) * streams)
    # Float32 forward and backward over sums of 32 terms: 1e-4 is a thousand times its eps.
    np.testing.assert_allclose(plain.bound[0, 0], expected, rtol=1e-4)


def test_loops_are_found_where_they_begin():
    rng = np.random.default_rng(0)
    text = rng.permutation(200)[:90].tolist()
    assert repetition.loop_start(text) is None
    assert repetition.loop_start([*text[:10], *[5] * 7]) == 14
    assert repetition.loop_start([*text[:10], *[5] * 6]) is None
    period = text[:15]
    assert repetition.loop_start([*text[30:40], *period * 4]) == 14
    assert repetition.loop_start([*text[30:40], *text[:21] * 5]) is None  # four times take more than 64 tokens


def test_rounds_after_the_loop_began_are_left_out():
    new = np.array([[9, 8] + [1, 2, 3, 4] * 4, list(range(20, 38))])
    ends = np.array([[0, 0], [3, 1], [6, 6], [11, 12], [16, 18], [18, 18]])
    whole = repetition.counted(new, ends, without_loops=False)
    assert whole == (36, 5 + 4, 2, 1)
    assert repetition.counted(new, ends, without_loops=True) == (6 + 18, 2 + 4, 2, 1)
    assert repetition.summed([whole, whole]) == (72, 18, 4, 2)


def test_rounds_of_a_trace_are_those_the_loop_counts(world):
    scheme = schemes.named_schemes(world)["draft_tree"]
    runner = Runner(world.lm.model, world.lm.params, scheme, capacity=CAPACITY, num_new=NEW)
    trace = runner.trace(world.prompts)
    found = repetition.counted(trace.new, trace.ends, without_loops=False)
    assert found.rounds == row_rounds(trace.state) and found.tokens == NEW * len(world.prompts)
    np.testing.assert_array_equal(trace.new, runner.finish(world.prompts))


def test_rank_shares_add_up_and_are_right_where_they_are_known():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (50, 23))
    for greedy in (True, False):
        same = trees.rank_shares(Children.WITHOUT_REPLACEMENT, greedy, logits, logits, key)
        np.testing.assert_allclose(same, np.eye(trees.RANKS)[0], atol=1e-6)  # a draft like the target is always right
    ranked = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1, *[1e-9] * 8]]))
    drafted = jnp.array([[9.0, 6.0, 7.0, 8.0, *[-50.0] * 8]])  # its order: tokens 0, 3, 2, 1
    found = trees.rank_shares(Children.CHOSEN, False, ranked, drafted, key)
    np.testing.assert_allclose(found[:4], [0.4, 0.1, 0.2, 0.3], atol=1e-6)
    ranked = jnp.roll(ranked, 2, axis=1)  # now token 2 is the most probable, the third of the draft's
    np.testing.assert_array_equal(trees.rank_shares(Children.CHOSEN, True, ranked, drafted, key), np.eye(8)[2])


def test_rank_shares_without_replacement_against_drawing_it():
    """The rule drawn 20,000 times on four tokens, in NumPy; the shares agree within five standard errors of both."""
    p, q = np.array([0.5, 0.25, 0.15, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    rng, draws, count = np.random.default_rng(0), 20_000, np.zeros(4)
    for _ in range(draws):
        left, probs = p.copy(), q.copy()
        for rank in range(4):
            token = rng.choice(4, p=probs)
            if rng.random() < left[token] / probs[token]:
                count[rank] += 1
                break
            left = np.maximum(left - probs, 0)
            left /= left.sum()
            probs[token] = 0
            probs /= probs.sum()
    wide = 40_000
    padded = [np.concatenate([probs, np.full(8, 1e-30)]) for probs in (p, q)]
    target, draft = (jnp.asarray(np.log(np.tile(probs, (wide, 1))), jnp.float32) for probs in padded)
    found = trees.rank_shares(Children.WITHOUT_REPLACEMENT, False, target, draft, jax.random.key(1))
    share = count / draws
    error = np.sqrt(share * (1 - share) / draws) * 1.3 + 1e-4
    assert np.all(np.abs(np.asarray(found)[:4] - share) < 5 * error)


@pytest.mark.parametrize(
    "shapes",
    [
        {0.0: ("tree",), 1.0: ("chain", "tree without replacement")},
        pytest.param({heat: tuple(of_heat) for heat, of_heat in trees.SHAPES.items()}, marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_trees_part(world, tmp_path, monkeypatch, shapes):
    few = {heat: {name: trees.SHAPES[heat][name] for name in names} for heat, names in shapes.items()}
    monkeypatch.setattr(trees, "SHAPES", few)
    result = bench_decoding.run(["trees"], world, SIZE, tmp_path / "result.json", tmp_path / "images")["trees"]
    assert len(result["points"]) == len(SIZE.trees.nodes) * sum(map(len, trees.SHAPES.values()))
    for point in result["points"]:
        assert 1 <= point["tokens_per_forward"] <= point["depth"] + 1
        assert point["depth"] == point["nodes"] or point["shape"] != "chain"


def test_loop_part(tmp_path):
    result = bench_decoding.run(["loop"], None, SIZE, tmp_path / "result.json", tmp_path / "images")["loop"]
    loops = result["loops"]
    assert loops["C = 1, 100% right"]["tokens_per_forward"] == 1
    new = SIZE.loop.new
    assert loops["C = 3, 100% right"]["tokens_per_forward"] == new / -(-new // 3)
    assert loops["C = 3, 60% right"]["tokens_per_forward"] < loops["C = 3, 100% right"]["tokens_per_forward"]
    assert set(result["latency_seconds"]) == {"1", "2", "3"}
    assert (tmp_path / "images" / "latency_curve.png").stat().st_size > 0


@pytest.mark.slow
def test_bfloat16_part(world, tmp_path, monkeypatch):
    named = schemes.named_schemes(world)
    few = {name: named[name] for name in (schemes.PLAIN, "draft_model")}
    monkeypatch.setattr(schemes, "named_schemes", lambda world: few)
    result = bench_decoding.run(["bfloat16"], world, SIZE, tmp_path / "result.json", tmp_path / "images")["bfloat16"]
    assert result["as it is"]["all_within_bound"]
    assert result["invariant"]["schemes"]["draft_model"]["divergence_rate"] == 0


def test_a_divergence_beyond_the_bound_is_reported(plain):
    new = plain.new.copy()
    new[0, 2] += 1
    bound = np.full_like(plain.bound, 1e-9)
    found = precision.facts(agreement.compare(new, dataclasses.replace(plain, bound=bound)))
    assert not found["within_bound"] and found["divergence_rate"] == 1 / len(new)
    assert precision.facts(agreement.compare(plain.new, plain))["largest_gap"] == 0


def test_batches_are_of_mixed_length(world):
    assert [[len(ids) for ids in prompts] for prompts in deal(world.prompts, 2)] == [[3, 7], [5, 11]]


def test_auxiliary_weights_part_counts_tokens_and_layers(shipped, monkeypatch):
    """On the embedded model: a lossless scheme and a lossy one, of which the second runs half the layers."""
    lm = shipped.lm
    halved = Scheme("", NoDraft(), ExactMatch(), layer_policy=SkipDecode(8, 4, 1))
    tried = [("medusa", 9, auxiliary.built(lm, "medusa", 8)), ("halved", 4, halved)]
    monkeypatch.setattr(auxiliary, "settings", lambda *_: iter(tried))
    monkeypatch.setattr(auxiliary, "report", lambda found: None)
    found = auxiliary.measure(shipped, SIZE.auxiliary)["schemes"]
    medusa, half = found["medusa"]["9"], found["halved"]["4"]
    assert medusa["lossless"] and medusa["same_rows"] == 4 and not half["lossless"]
    assert medusa["tokens_per_forward"] == medusa["tokens_per_full_forward"] > 1  # every forward runs all layers
    new = SIZE.auxiliary.num_new
    assert half["tokens_per_forward"] == 1
    # The first forward runs all layers.
    assert half["tokens_per_full_forward"] == pytest.approx(8 * new / (8 + 4 * (new - 1)))
    assert half["layers_per_forward_of_a_row"] == half["layers_per_forward_of_the_batch"]
    assert medusa["followed"] == 1 and half["followed"] < 1
    wrong = dataclasses.replace(tried[0][2], params=jax.tree.map(lambda leaf: 1.1 * leaf, lm.params))
    monkeypatch.setattr(auxiliary, "settings", lambda *_: iter([("medusa", 9, wrong)]))
    with pytest.raises(SystemExit, match="medusa at 9 gives other tokens than plain decoding"):
        auxiliary.measure(shipped, SIZE.auxiliary)


def test_typical_part_samples_and_departs_from_the_distribution(shipped, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    bench_decoding.run(["typical"], shipped, SIZE, path, tmp_path)
    found = json.loads(path.read_text())["typical"]["schemes"]
    own, exact, lossy = found[typical.PLAIN], found[typical.EXACT], found["epsilon 0.09"]
    assert own["tokens_per_forward"] == 1 < exact["tokens_per_forward"]
    assert exact["same_rows"] == 4 > lossy["same_rows"]  # greedily typical acceptance, too, would keep all four
    assert exact["lossless"] and not lossy["lossless"]
    for one in found.values():
        assert 0 < one["probability"] < 1 and one["log_probability"] < 0 < one["excess_error"]
        assert one["excess"] == pytest.approx(one["log_probability"] - one["log_probability_if_drawn"])
    assert exact["excess"] == own["excess"] != lossy["excess"]
    plain, scheme, *_ = typical.schemes(shipped.lm, SIZE.typical)
    wrong = dataclasses.replace(scheme, params=jax.tree.map(lambda leaf: 1.1 * leaf, shipped.lm.params))
    monkeypatch.setattr(typical, "schemes", lambda *_: iter([plain, wrong]))
    with pytest.raises(SystemExit, match="exact match gives other tokens than plain decoding"):
        typical.measure(shipped, SIZE.typical)


def test_probabilities_of_the_written_text_by_hand(world):
    """Float64 from the logits of a full forward; float32 in another order moves ln p by a few eps of logits: 1e-4."""
    lm = world.lm
    runner = Runner(lm.model, lm.params, Scheme("plain"), capacity=CAPACITY, num_new=NEW)
    trace = runner.trace(world.prompts, 1.0)
    rows = []
    for prompt, new in zip(world.prompts, trace.new, strict=True):
        logits = np.asarray(logits_of(world, np.concatenate([prompt, new])), np.float64)[len(prompt) - 1 : -1]
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        written = probs[np.arange(NEW), new]
        rows.append([written, (probs**2).sum(axis=1), np.log(written), (probs * np.log(probs)).sum(axis=1)])
    values = np.array(rows).mean(axis=2)
    excess = values[:, 2] - values[:, 3]
    expected = [*values.mean(axis=0), excess.mean(), excess.std(ddof=1) / 2]
    found = typical.under_the_distribution(lm.model, lm.params, [trace])
    names = ("probability", "probability_if_drawn", "log_probability", "log_probability_if_drawn")
    np.testing.assert_allclose([found[name] for name in (*names, "excess", "excess_error")], expected, atol=1e-4)


@pytest.mark.parametrize("name, adapter", [("unchanged", None), ("layer_skip", "layer_skip")])
def test_exits_part_applies_the_head_after_each_layer(shipped, tmp_path, name, adapter):
    """The same shares from one forward of the loaded model."""
    bench_decoding.run(["exits"], shipped, SIZE, tmp_path / "result.json", tmp_path)
    part = json.loads((tmp_path / "result.json").read_text())["exits"]["models"]
    lm = decodax.load(dtype="float32", adapter=adapter)
    tokens = jnp.asarray(shipped.heldout[:, :-1])
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    states = lm.model.apply(lm.params, tokens, position, capture=tuple(range(1, 9))).captured
    said = [np.asarray(jnp.argmax(lm.model.logits(lm.params, states[layer]), axis=2)) for layer in range(1, 9)]
    expected = [np.mean(one == said[-1]) for one in said[:-1]]
    np.testing.assert_allclose(part[name]["exit_agreement"], expected, atol=1e-6)
    assert part[name]["tokens"] == tokens.size and (part[name]["greedy"] == 1) == (adapter is None)
    assert 0 < expected[0] < expected[-1] < 1


def test_every_token_is_compared_with_the_model_s_own(world):
    """One different token counts once, however the text continues after it."""
    lm = world.lm
    runner = Runner(lm.model, lm.params, Scheme("plain"), capacity=CAPACITY, num_new=NEW)
    trace = runner.trace(world.prompts[:2])
    assert agreement.share_followed(lm.model, lm.params, [trace]) == 1
    last = trace.state.length[0] - 1
    other = (trace.state.tokens[0, last] + 1) % lm.config.vocab_size
    state = dataclasses.replace(trace.state, tokens=trace.state.tokens.at[0, last].set(other))
    new = trace.new.copy()
    new[0, -1] = other
    found = agreement.share_followed(lm.model, lm.params, [trace._replace(new=new, state=state)])
    assert found == pytest.approx(1 - 1 / new.size)


def test_layer_policy_part_times_half_the_layers(tmp_path):
    path = tmp_path / "result.json"
    bench_decoding.run(["depth"], None, SIZE, path, tmp_path)
    part = json.loads(path.read_text())["depth"]
    assert part["layers"] == [1, 2] and part["batch 2"]["half the layers / all layers"]["median"] > 0


def test_sizes_part_chooses_by_the_curve_and_replays(tmp_path):
    path = tmp_path / "result.json"
    bench_decoding.run(["sizes"], None, SIZE, path, tmp_path)
    part = json.loads(path.read_text())["sizes"]
    assert set(part["latency_seconds"]) == {"1", "2", "8"} and set(part["chosen"]) == {"ppd", "medusa"}
    for by in part["chosen"].values():
        assert by["nodes"] in (1, 2, 8) and ("replay_speed_up" in by) == (by["nodes"] > 1)
    # What Vicuna-7B was measured with: 2.4 tokens and more at about 100 tokens per forward (arXiv 2405.18628).
    assert 2.2 < sizes.expected((105,))["ppd"][105] < 2.8
    assert sum(sizes._acceptance(1.7, 4) ** i for i in range(5)) == pytest.approx(1.7)
