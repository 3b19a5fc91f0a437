"""Strategies by name count right, choose their sizes by measured times, take any draft that fits, refuse bad input.

What holds for every strategy, with the embedded model, is in `contracts/test_strategies.py`.
"""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import decodax
from decodax import decoding
from decodax.decoding import built_strategies, draft_length, programs, strategies
from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.decoding.drafters import DraftModel, PromptLookup
from decodax.decoding.find_draft import find_draft
from decodax.decoding.prompt_tree import dynamic_trees, stationary_expected_tokens
from decodax.decoding.strategies import DraftingStrategy, DraftModelChain, PromptLookupChain, Speculation, medusa, ppd
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers import ExactMatch, TypicalAcceptance
from decodax.models.load import LanguageModel, find_folder
from decodax.models.medusa_heads import MedusaShape, initial_heads
from tests.decoding.test_generation import LETTERS, LM, PROMPTS, letter_tokenizer
from tests.tiny import tiny_model

NEW = 24
# A draft that often agrees with the model: the same weights, disturbed.
DRAFT = dataclasses.replace(
    LM, params=jax.tree.map(lambda leaf: leaf + 0.03 * jax.random.normal(jax.random.key(2), leaf.shape), LM.params)
)


def generate(lm=LM, prompts=PROMPTS, **options):
    return decodax.generate(lm, prompts, **{"max_new_tokens": NEW, **options})


@pytest.fixture(scope="module")
def plain():
    return generate()


def test_stats_add_up(plain):
    stats = generate(strategy="draft_model", draft=DRAFT, draft_tokens=3).stats
    assert stats.strategy == "draft_model" and stats.fallback is None
    lengths = stats.accepted_lengths
    assert len(lengths) == 4 and len(stats.proposed) == len(stats.accepted) == 3
    assert stats.num_new_tokens == 3 * NEW == sum((n + 1) * times for n, times in enumerate(lengths))
    assert stats.tokens_per_forward == 3 * NEW / sum(lengths) > 1.3
    assert max(sum(lengths) / 3, 1) <= stats.target_forwards < NEW
    assert 3 * stats.target_forwards <= stats.draft_forwards <= 4 * stats.target_forwards
    assert stats.acceptance_per_position == tuple(a / o for a, o in zip(stats.accepted, stats.proposed, strict=True))
    assert all(o <= sum(lengths) and a <= o for a, o in zip(stats.accepted, stats.proposed, strict=True))
    assert stats.proposed[1:] == stats.accepted[:-1]  # in a chain, each accepted token proposes the next one
    none = plain.stats
    assert none.strategy == "autoregressive" and none.tokens_per_forward == 1 and none.acceptance_per_position == ()


def test_an_exact_draft_is_fully_accepted():
    stats = generate(strategy="draft_model", draft=LM, draft_tokens=3).stats
    assert stats.accepted_lengths == (0, 0, 0, 3 * NEW // 4) and stats.acceptance_per_position == (1, 1, 1)
    sampled = generate(strategy="draft_model", draft=LM, draft_tokens=3, temperature=1.0, seed=[1, 2, 3]).stats
    assert sampled.accepted_lengths[:3] == (0, 0, 0)


@pytest.mark.slow
def test_another_seed_gives_other_tokens():
    options = {"strategy": "draft_model", "draft": DRAFT, "temperature": 0.8, "top_p": 0.95}
    one, other = (generate(seed=seed, **options).tokens for seed in ([3, 1, 2], [4, 5, 6]))
    assert any(list(a) != list(b) for a, b in zip(one, other, strict=True))


def test_streaming_and_stop_strings(plain):
    stop, pieces = plain.text[1][7:9], ["", "", ""]

    def collect(row, piece):
        pieces[row] += piece

    out = generate(strategy="draft_model", draft=DRAFT, stop=stop, on_text=collect, block_tokens=3)
    want = generate(stop=stop)
    assert pieces == out.text == want.text and out.finish_reasons == want.finish_reasons


def test_a_strategy_made_by_hand(plain):
    made = decoding.Speculation(DraftModel.top_k(LM.model, (-1, 0, 0, 1)), ExactMatch(), DRAFT.params)
    out = generate(strategy=made)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.strategy == "DraftModel + ExactMatch"


def test_a_second_call_does_not_compile_again(monkeypatch):
    monkeypatch.setattr(programs, "_programs", type(programs._programs)())
    made = decoding.Speculation(DraftModel.chain(LM.model, 2), ExactMatch(), DRAFT.params)
    generate(strategy=made, max_new_tokens=20)
    compiled = programs.num_programs()
    generate(strategy=made, max_new_tokens=21)  # within the same buffers
    assert programs.num_programs() == compiled
    assert [kept._cache_size() for kept in programs._programs.values()] == [1] * compiled


def test_the_embedded_model_s_draft_is_small():
    facts = json.loads((find_folder(None) / "draft" / "draft.json").read_text(encoding="utf-8"))
    assert facts["num_parameters"] < 800_000


@pytest.fixture
def takes(monkeypatch):
    """Sets how long forwards take, by a clock that only they move: the measuring itself is the library's.

    takes(seconds): seconds(params, N) are those of a forward over N tokens with these weights. Now and then one takes
    100 times as long, as on a machine with other work.
    """
    now, count = [0.0], itertools.count()

    def set_to(seconds):
        def forwards(model, params, caches, cached_tokens, num_tokens):
            def run(size):
                now[0] += seconds(params, size) * (100 if next(count) % 11 == 5 else 1)

            return {size: partial(run, size) for size in num_tokens}

        monkeypatch.setattr(draft_length, "forwards", forwards)
        monkeypatch.setattr(built_strategies, "_built", WeakKeyDictionary())  # what other times led to

    monkeypatch.setattr(draft_length, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return set_to


def test_the_length_is_chosen_from_measured_times(takes, plain, tmp_path):
    """The draft is as slow as the model; then it costs next to nothing, and the longest draft is the fastest."""
    facts = {"heldout": {"greedy": 0.9, "rank_acceptance": [0.9, 0.05]}}
    (tmp_path / "draft.json").write_text(json.dumps(facts), encoding="utf-8")
    draft = dataclasses.replace(DRAFT, path=tmp_path)
    takes(lambda params, size: 0.9 + 0.1 * size)
    with pytest.warns(UserWarning, match="falls back to plain decoding: plain decoding is faster than any draft"):
        out = generate(strategy="draft_model", draft=draft, draft_tokens="auto")
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.fallback is not None and out.stats.accepted_lengths == ()
    takes(lambda params, size: 0.01 if params is DRAFT.params else 0.9 + 0.1 * size)
    out = generate(strategy="draft_model", draft=draft, draft_tokens="auto")
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.fallback is None and len(out.stats.accepted_lengths) == 8 + 1
    # A draft token takes a quarter of a forward of any size: 1.9 / 1.25, 2.71 / 1.5, ... the best lies between.
    takes(lambda params, size: 0.25 if params is DRAFT.params else 1.0)
    made = strategies.METHODS["draft_model"]("auto").build(LM, draft)
    rates = {length: sum(0.9**i for i in range(length + 1)) / (1 + 0.25 * length) for length in draft_length.LENGTHS}
    assert made.drafter.max_depth == max(rates, key=rates.get) not in (1, 8)


def test_choice_of_the_length():
    seconds = {1: 1.0, 2: 1.0, 3: 1.0, 5: 1.0, 9: 1.0}
    # Free drafts: the longest. Tokens per round at acceptance 0.5: 1.5, 1.75, 1.9375, 1.996.
    assert draft_length.choose_draft_tokens(seconds, 0.0, 0.5).num_tokens == 8
    # At 0.1 a token: 1.5/1.1, 1.75/1.2, 1.9375/1.4, 1.996/1.8.
    choice = draft_length.choose_draft_tokens(seconds, 0.1, 0.5)
    assert choice.num_tokens == 2 and choice.speed_up == pytest.approx(1.75 / 1.2)
    none = draft_length.choose_draft_tokens(seconds, 0.6, 0.5)
    assert (none.num_tokens, none.speed_up) == (0, 1.0) and "plain decoding is faster" in none.reason
    with pytest.raises(ValueError, match="acceptance must be a probability"):
        draft_length.choose_draft_tokens(seconds, 0.1, 1.5)


def test_choice_of_the_size_of_a_tree():
    """Tokens per second: 1.6, 2.0 and 2.2 tokens, by what their forwards take."""
    tokens = {4: 1.6, 8: 2.0, 16: 2.2}
    flat = draft_length.choose_tree_size(dict.fromkeys((1, *tokens), 0.5), tokens)
    assert (flat.num_tokens, flat.speed_up) == (15, pytest.approx(2.2))
    # 0.6 for one token, and 1.6 / 0.9, 2 / 1.3, 2.2 / 2.1
    rising = draft_length.choose_tree_size({size: 0.5 + 0.1 * size for size in (1, *tokens)}, tokens)
    assert (rising.num_tokens, rising.speed_up) == (3, pytest.approx(0.6 * 1.6 / 0.9))
    none = draft_length.choose_tree_size({size: float(size) for size in (1, *tokens)}, tokens)
    assert (none.num_tokens, none.speed_up) == (0, 1.0) and "plain decoding is faster" in none.reason


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.quick_cases(1)
def test_drafts_of_a_number_of_tokens_are_counted(plain, number):
    """A chain has as many positions; a tree has one for each level, all accepted where the draft model is exact."""
    early = generate(strategy="layer_skip", draft_tokens=number)
    np.testing.assert_array_equal(early.tokens, plain.tokens)
    assert len(early.stats.proposed) == number == len(early.stats.accepted_lengths) - 1
    assert early.stats.draft_forwards == (number + 1) * early.stats.target_forwards
    tree = generate(strategy="draft_tree", draft=LM, draft_tokens=number)
    np.testing.assert_array_equal(tree.tokens, plain.tokens)
    depth = len(tree.stats.proposed)
    assert 1 <= depth <= number and tree.stats.accepted == tree.stats.proposed
    assert tree.stats.accepted_lengths[-1] * (depth + 1) > 3 * NEW // 2


# Of draft tokens at distances 1, 2 and 3.
RANKS = [[share * 0.5**rank for rank in range(10)] for share in (0.4, 0.3, 0.25)]


def weights_of(kind, params, **shape):
    return AuxiliaryWeights(kind, params, {"about": {"shape": shape}, "heldout": {"rank_accuracy": RANKS}}, kind)


PROMPT_TOKENS = weights_of("ppd", {"embedding": jax.random.normal(jax.random.key(3), (3, 2, LM.config.hidden_size))})
HEADS = weights_of("medusa", {"heads": initial_heads(LM.params, MedusaShape(3))})
# Module with the sizes that are tried, auxiliary weights, and expected tokens of a forward over as many nodes.
OWN_TREES = {
    "ppd": (ppd, PROMPT_TOKENS, lambda size: stationary_expected_tokens(RANKS, dynamic_trees(RANKS, size, 2))),
    "medusa": (
        medusa,
        HEADS,
        lambda size: expected_tokens([*RANKS, [0.0] * 10], best_tree([*RANKS, [0.0] * 10], size - 1)),
    ),
}


@pytest.mark.parametrize("name", OWN_TREES)
@pytest.mark.quick_cases(1)
def test_the_size_of_a_tree_is_chosen_from_measured_times(takes, plain, name):
    module, weights, expected = OWN_TREES[name]
    sizes = [size for size in module.SIZES if size >= 10 or name == "medusa"]  # 3 x 2 prompt tokens, 1 + 1 + 2 nodes

    def choose(seconds):
        takes(lambda params, size: seconds(size))
        return strategies.METHODS[name]("auto").build(LM, weights)

    flat = choose(lambda size: 0.3).drafter
    assert sizes[-1] - 3 <= flat.num_nodes <= sizes[-1] == 128  # what is left has no room for another draft token
    rising = choose(lambda size: 1 + size / 50).drafter
    wanted = max(sizes, key=lambda size: expected(size) / (1 + size / 50))
    assert sizes[0] < wanted < sizes[-1] / 2 and wanted - 3 <= rising.num_nodes <= wanted
    takes(lambda params, size: float(size))
    with pytest.warns(UserWarning, match=f"{name} falls back to plain decoding: plain decoding is faster than any"):
        out = generate(strategy=name, draft=weights, draft_tokens="auto")
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.fallback is not None and out.stats.accepted_lengths == ()


def test_the_low_rank_change_of_medusa_heads_has_the_scale_of_their_facts():
    draw, (outputs, inputs) = np.random.default_rng(0), LM.params["blocks_1"]["mixer"]["key"].shape
    change = {"down": draw.normal(size=(2, inputs)), "up": draw.normal(size=(outputs, 2))}
    low_rank = jax.tree.map(np.float32, {"blocks_1": {"mixer": {"key": change}}})
    weights = weights_of("medusa", HEADS.params | {"low_rank": low_rank}, change_scale=0.375)
    made = strategies.METHODS["medusa"]().build(LM, weights)
    key = np.asarray(LM.params["blocks_1"]["mixer"]["key"], np.float64) + 0.375 * change["up"] @ change["down"]
    np.testing.assert_allclose(made.params["blocks_1"]["mixer"]["key"], key, atol=1e-5)  # float32 numbers of order 1
    same = made.params | {"blocks_1": made.params["blocks_1"] | {"mixer": LM.params["blocks_1"]["mixer"]}}
    jax.tree.map(np.testing.assert_array_equal, same, LM.params)


def test_an_ensemble_of_prompt_tokens_by_name(plain):
    drafter = strategies.METHODS["ppd"](19).build(LM, PROMPT_TOKENS).drafter
    assert drafter.ensemble == 2 and drafter.trees == dynamic_trees(RANKS, 20, 2)
    out = generate(strategy="ppd", draft=PROMPT_TOKENS, draft_tokens=19)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.strategy == "ppd" and sum(out.stats.proposed) > 0 == out.stats.draft_forwards


def test_options_in_the_name_are_those_of_the_class(plain):
    """Tokens, counts and the name are the same however the options were given; every option reaches its place."""
    named = generate(strategy="draft_model:3", draft=DRAFT)
    assert named.stats.strategy == "draft_model:3" and len(named.stats.proposed) == 3
    for same in ({"strategy": "draft_model", "draft_tokens": 3}, {"strategy": DraftModelChain(3)}):
        out = generate(draft=DRAFT, **same)
        np.testing.assert_array_equal(out.tokens, named.tokens)
        assert out.stats.accepted_lengths == named.stats.accepted_lengths
    np.testing.assert_array_equal(named.tokens, plain.tokens)
    assert PromptLookupChain(5, 4, 2).build(LM).drafter == PromptLookup(5, 4, 2)
    early = strategies.LayerSkip(draft_tokens=5, exit_layer=1).build(LM).drafter
    assert (early.exit_layer, early.max_tokens) == (1, 5)
    assert strategies.LayerSkip(exit_layer=1).build(LM).drafter.max_tokens == 6
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.1 \(layers that draft, of 2\), got 2"):
        generate(strategy="layer_skip:exit_layer=2")
    typical = strategies.MedusaTree(8, epsilon=0.25).build(LM, HEADS)
    assert typical.verifier == TypicalAcceptance(0.25, 0.5) and typical.drafter.num_nodes == 9
    assert strategies.MedusaTree().build(LM, HEADS).verifier == ExactMatch()


def test_latency_curve_has_a_time_for_every_size():
    curve = draft_length.latency_curve(LM.model, LM.params, (1, 3), cached_tokens=5)
    assert set(curve) == {1, 3} and all(seconds > 0 for seconds in curve.values())


def other_vocabulary():
    model, params = tiny_model(vocab_size=41)
    return LanguageModel(model, model.config, params, None, Path("other"), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fastest"}, r"strategy must be one of \['autoregressive', .*got 'fastest'"),
        ({"strategy": 3}, "a name, a Strategy object, a Speculation"),
        ({"strategy": "draft_model"}, "'draft_model' needs a draft for tiny: pass draft=FOLDER"),
        ({"strategy": "draft_model", "draft": other_vocabulary()}, "vocabulary of 37 tokens, got 41 in other"),
        ({"strategy": "draft_model", "draft": DRAFT, "draft_tokens": 0}, "draft_tokens must be .* at least 1, .*got 0"),
        ({"strategy": "draft_tree", "draft": DRAFT, "draft_tokens": 0}, "draft_tokens must be .* at least 1, .*got 0"),
        (
            {"strategy": "draft_tree", "draft": DRAFT, "draft_tokens": "auto"},
            "draft_tokens must be a whole number, got 'auto'",
        ),
        (
            {"strategy": "draft_model", "draft": DRAFT, "draft_tokens": "many"},
            "a whole number, at least 1, or 'auto', got 'many'",
        ),
        ({"strategy": "draft_model", "draft": DRAFT, "draft_tokens": "auto"}, "needs the acceptance"),
        ({"strategy": "ppd", "draft": PROMPT_TOKENS, "draft_tokens": 8}, "draft_tokens must be at least 9 for ppd"),
        ({"strategy": "prompt_lookup", "draft": DRAFT}, "needs no auxiliary weights"),
        (
            {"strategy": "prompt_lookup", "draft_tokens": "auto"},
            "draft_tokens must be a whole number, got 'auto'",
        ),
        (
            {"strategy": "autoregressive", "draft_tokens": 3},
            "strategy 'autoregressive' has no option draft_tokens: it takes none",
        ),
        (
            {"strategy": PromptLookupChain(3), "draft_tokens": 3},
            "draft_tokens needs the name of a strategy that drafts",
        ),
        ({"strategy": "autoregressive", "draft": DRAFT}, "draft needs a strategy with auxiliary weights .*autoregr"),
        (
            {"strategy": "draft_model:3", "draft": DRAFT, "draft_tokens": 4},
            "draft_tokens is given twice: 3 and 4, with",
        ),
        ({"strategy": "medusas"}, "got 'medusas': did you mean 'medusa'"),
        ({"strategy": "kangaroo:confidence=2"}, r"confidence must be a number in 0\.\.1, got 2"),
        ({"strategy": "medusa:epsilon=0"}, "epsilon must be a number above 0, at most 1, got 0"),
        ({"strategy": "prompt_lookup:min_ngram=5"}, "1 <= min_ngram <= max_ngram"),
        ({"strategy": "prompt_lookup:max_ngram=many"}, "max_ngram must be a whole number, got 'many'"),
        ({"strategy": "first:threshold=never"}, r"threshold must be a number, got 'never'"),
        ({"strategy": "skip_decode:0"}, "decay_tokens must be a whole number, at least 1, got 0"),
        ({"strategy": "specee:1.5"}, r"threshold must be a number in 0\.\.1, got 1.5"),
        ({"strategy": "layer_skip:exit_layer=0"}, "exit_layer must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**options)


@pytest.mark.parametrize("name", sorted(set(strategies.METHODS) - {"autoregressive"}))
def test_a_draft_that_is_too_large_is_refused_before_anything_is_built(name):
    drafts = issubclass(strategies.METHODS[name], DraftingStrategy)
    most = "draft_tokens must be at most 511, as the model's context is 512, got "
    for size in (512, 100_000, 10**6, 10**400):
        with pytest.raises(ValueError, match=most if drafts else f"strategy '{name}' has no option draft_tokens"):
            generate(strategy=name, draft_tokens=size)
        if drafts and size < 10**400:  # Python reads no number of as many digits from a text
            with pytest.raises(ValueError, match=most):
                generate(strategy=f"{name}:{size}")


def test_a_strategy_is_a_name_a_speculation_or_a_function():
    for wrong in (3, [], {}, "", object(), int, DraftModel, DraftModel.chain(LM.model, 2), np.zeros(3), ExactMatch()):
        with pytest.raises(ValueError, match=r"strategy must be .*a Speculation or a function from a model, got .+$"):
            generate(strategy=wrong)
    with pytest.raises(ValueError, match=r"strategy must be .* what this function gives is 3\b"):  # JAX adds a note
        generate(strategy=lambda model: 3)
    with pytest.raises(ValueError, match=r"that strategy gives must return a DecodeState, got 5\b"):
        generate(strategy=lambda model: lambda params, state, max_tokens: 5)


def test_a_speculation_that_cannot_be_hashed_is_refused():
    class Listed(PromptLookup):
        __hash__ = None

    class Unfrozen(ExactMatch):
        def __hash__(self):
            return hash([])

    with pytest.raises(ValueError, match=r"drafter must be hashable, .*, got .*"):
        Speculation(Listed(3), ExactMatch())
    with pytest.raises(ValueError, match=r"verifier must be hashable, .*, got .*"):
        Speculation(PromptLookup(3), Unfrozen())


@pytest.mark.parametrize(
    ("params", "found"),
    [({}, "nothing"), ({"a": 1}, "nothing"), (LM.params | {"embedding": np.zeros(3)}, r"shape \[3\]")],
)
def test_a_speculation_with_other_weights_than_the_model_s_is_refused(params, found):
    with pytest.raises(ValueError, match=rf"params of a Speculation must hold all weights .*shape \[.*, got {found}$"):
        generate(strategy=Speculation(PromptLookup(3), ExactMatch(), params=params))


@pytest.mark.parametrize("name", sorted(set(strategies.METHODS) - {"autoregressive"}))
def test_a_bad_draft_is_refused_by_name(name):
    for wrong in (3, b"folder", ["folder"], True, 0.5):
        with pytest.raises(ValueError, match=r"draft must be .*got |got draft=|pass draft=FOLDER or none, got "):
            strategies.METHODS[name]().build(LM, wrong)
    if strategies.METHODS[name].auxiliary_weights == DraftModel.auxiliary_weights:
        with pytest.raises(FileNotFoundError, match=r"draft: no such model folder: .*nowhere"):
            strategies.METHODS[name]().build(LM, "nowhere")


def resized(lm, size):
    """The same model with its vocabulary cut to `size`, or padded with tokens more probable than any other."""
    extra = ((0, max(0, size - lm.config.vocab_size)), (0, 0))
    model = dataclasses.replace(lm.model, config=dataclasses.replace(lm.config, vocab_size=size))
    tables = {name: jnp.pad(lm.params[name][:size], extra, constant_values=9.0) for name in ("embedding", "head")}
    return dataclasses.replace(lm, model=model, config=model.config, params=lm.params | tables)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("draft_model", 31),
        ("draft_tree", 41),
        pytest.param("draft_model", 41, marks=pytest.mark.slow),
        pytest.param("draft_sampled_tree", 31, marks=pytest.mark.slow),
        pytest.param("draft_sampled_tree", 41, marks=pytest.mark.slow),
    ],
)
@pytest.mark.quick_cases(1)
def test_a_draft_whose_vocabulary_has_another_size(plain, name, size):
    out = generate(strategy=name, draft=resized(DRAFT, size))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert max(map(max, out.tokens)) > 31  # tokens outside the smaller draft's vocabulary
    assert out.stats.tokens_per_forward > {31: 1.1, 41: 1.3}[size]


def test_ids_that_only_one_tokenizer_uses_make_no_difference():
    tokenizer = letter_tokenizer()
    words = tokenizer.backend.get_vocab() | {"<extra>": len(LETTERS)}
    tokenizer.backend.model = tokenizers.models.WordLevel(words)
    draft = dataclasses.replace(resized(DRAFT, 41), tokenizer=tokenizer)
    for lm in (LM, resized(LM, 43)):
        assert find_draft("draft_model", lm, draft).lm.model.vocab_size == lm.config.vocab_size


def test_another_tokenizer_is_refused():
    tokenizer = letter_tokenizer()
    words = tokenizer.backend.get_vocab()
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer.backend.model = tokenizers.models.WordLevel(words)
    draft = dataclasses.replace(DRAFT, tokenizer=tokenizer, path=Path("swapped"))
    with pytest.raises(ValueError, match="token 0 is 'a' in tiny and 'b' in swapped"):
        generate(strategy="draft_model", draft=draft)


def test_the_error_for_a_step_that_does_not_fit_says_what_would(monkeypatch):
    """A sampled tree makes logits, processed ones, and distributions of the draft, at all of its nodes."""
    monkeypatch.setattr("decodax.decoding.sizes.free_bytes", lambda: 4 * 4 * 3 * 9 * 37 - 1)
    options = {"strategy": "draft_sampled_tree", "draft": DRAFT, "temperature": 0.7}
    with pytest.raises(
        MemoryError, match=r"9 tokens in each of 3 rows makes 4 arrays of logits \[3, 9, 37\], 15,984 bytes, and 15,983"
    ) as refused:
        generate(**options)
    assert str(refused.value).endswith("lower draft_tokens, or split the batch")
    with pytest.raises(MemoryError, match="the cache for 3 rows"):  # the step itself fits
        generate(draft_tokens=7, **options)
