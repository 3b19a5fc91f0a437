"""The MTP head: as transformers computes it, loaded from a folder, and drafting without changing the output."""

import dataclasses
import re
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import decodax
from decodax import decoding
from decodax.cli.app import app as cli
from decodax.decoding import chunked_prefill
from decodax.decoding.drafters import Children, MTPHead
from decodax.decoding.logits_processors import History
from decodax.decoding.strategies import METHODS
from decodax.decoding.verifiers import ChainRejection, ExactMatch
from decodax.layers.execution import Execution
from decodax.layers.rope import DynamicScaling
from decodax.models.load import load
from decodax.models.model import Model
from decodax.models.mtp_head import load_mtp_head, mtp_head
from tests.golden_files import load_golden
from tests.speculation import NO_STOPS, OPTIONS, TOLERANCE, assert_same

FOLDER = Path(__file__).parents[2] / "golden" / "deepseek_v3_mtp"
GOLDEN_TOLERANCE = 2e-4  # as for whole models (test_families.py)
LM = load(FOLDER, dtype="float32")
MODEL, HEAD = LM.model, mtp_head(LM.model)
WEIGHTS = load_mtp_head(FOLDER, MODEL, dtype="float32")
VOCABULARY, SIZE, CAPACITY = LM.config.vocab_size, LM.config.hidden_size, 64
LENGTHS, NEW = np.array([5, 13, 1]), np.array([29, 24, 33])
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 13))
MOST, NAMED = 3, 17


def calmer(params, factor):
    """A model, or an MTP head, whose blocks add less, so that predictions depend mostly on the last token."""

    def change(path, leaf):
        is_last = path[-1].key in ("out", "down") and any("block" in key.key for key in path)
        return leaf * jnp.float32(factor) if is_last else leaf

    return jax.tree_util.tree_map_with_path(change, params)


# A target and an MTP head that agree often but not always: both depend mostly on the last token's embedding.
PARAMS = calmer(LM.params, 0.1)
NOISE = 0.03 * jax.random.normal(jax.random.key(0), (SIZE, SIZE))
HEAD_PARAMS = calmer(WEIGHTS, 0.05) | {
    "embedding_norm": {"weight": jnp.ones(SIZE)},
    "join": jnp.concatenate([0.5 * jnp.eye(SIZE), NOISE], axis=1),
    "final_norm": PARAMS["final_norm"],
}


def start(rows=slice(None), *, options="sampled", stop_token_ids=NO_STOPS, params=PARAMS, prompts=PROMPTS):
    index = np.arange(3)[rows]
    per_row = {
        name: [value[i] for i in index] if isinstance(value, list) else value
        for name, value in OPTIONS[options].items()
    }
    sampling = decoding.Sampling.create(len(index), VOCABULARY, **per_row)
    return decoding.prefill(
        MODEL, params, prompts[rows], LENGTHS[rows], NEW[rows], index, sampling=sampling, stop_token_ids=stop_token_ids
    )


plain_decode = jax.jit(decoding.autoregressive(MODEL))


@cache
def plain(options="sampled"):
    return plain_decode(PARAMS, start(options=options))


SPECULATION = decoding.speculative(MODEL, MTPHead(MODEL, MOST, Children.CHOSEN), ExactMatch())
begin, decode = jax.jit(SPECULATION.start), jax.jit(SPECULATION)


def run(*, params=PARAMS, head=HEAD_PARAMS, max_tokens=1000, **changes):
    return decode(params, head, begin(params, head, start(params=params, **changes)), max_tokens)


ended = cache(run)


@jax.jit
def head_output(head, embedded, hidden):
    position = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    return HEAD.apply(head, embedded, hidden, position)


@jax.jit
def target_of(params, tokens):
    """Inputs of the MTP head for whole texts: the embedding of the token after each, and hidden states."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = MODEL.normed(params, MODEL.apply(params, tokens, position).hidden)
    return MODEL.embed(params, jnp.roll(tokens, -1, axis=1), tokens * 0), hidden


def texts_of(state):
    """The texts of three rows, padded to one length so that one program serves all; padding changes nothing."""
    tokens = np.asarray(state.tokens)
    return jnp.asarray(np.pad(tokens, ((0, 3 - len(tokens)), (0, CAPACITY - tokens.shape[1]))))


def chain_logits(params, head, tokens, length):
    """Float[B, MOST, V]: the logits of each draft token, recomputed from scratch.

    The draft follows each row's `length`; there the head's output takes the place of the hidden state.
    """
    embedded, hidden = target_of(params, tokens)
    row, outputs = np.arange(len(length)), []
    for place in range(MOST):
        output, _ = head_output(head, embedded, hidden)
        outputs.append(output[row, length - 2 + place])
        hidden = hidden.at[row, length - 1 + place].set(outputs[-1])
    return np.asarray(MODEL.read_out(params, jnp.stack(outputs, axis=1)))


def assert_drafters_state(state, rows=(0, 1, 2)):
    """Its cache holds every token but the last, all computed from true hidden states, and nothing after them."""
    output, made = jax.tree.map(np.asarray, head_output(HEAD_PARAMS, *target_of(PARAMS, texts_of(state))))
    own, latest = jax.tree.map(np.asarray, state.draft)
    for row in rows:
        length = int(state.length[row]) - 1
        assert int(own.length[row]) == length
        for got, want in ((own.latent, made.latent), (own.rope_key, made.rope_key)):
            np.testing.assert_allclose(got[row, :length], want[row, :length], atol=TOLERANCE)
            assert not np.any(got[row, length:])
        want = output[row, length - 1] if length else np.zeros(SIZE)
        np.testing.assert_allclose(latest.output[row], want, atol=TOLERANCE)


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "mtp_head.npz") as file:
        return dict(file)


def test_logits_are_those_of_transformers(golden):
    tokens = np.pad(golden["tokens"], ((0, 0), (0, CAPACITY - golden["tokens"].shape[1])))
    output, _ = head_output(WEIGHTS, *target_of(LM.params, jnp.asarray(tokens)))
    logits = np.asarray(MODEL.read_out(LM.params, output))
    for row, length in enumerate(golden["length"]):
        got, want = logits[row, : length - 1], golden["logits"][row, : length - 1]
        np.testing.assert_allclose(got, want, rtol=0, atol=GOLDEN_TOLERANCE)
        tokens[row, length : length + MOST] = golden["drafted"][row]
    chained = chain_logits(LM.params, WEIGHTS, jnp.asarray(tokens), golden["length"])
    np.testing.assert_allclose(chained, golden["chained"], rtol=0, atol=GOLDEN_TOLERANCE)


@pytest.mark.slow
def test_output_and_caches_are_those_of_plain_decoding():
    """One row is greedy, the others are drawn."""
    state = ended()
    assert_same(state, plain())
    assert_drafters_state(state)
    assert int(state.num_target_forwards) < int(plain().num_target_forwards)


@pytest.mark.slow
def test_drafts_are_counted():
    """Drafts are accepted fully, partly and not at all; a round takes as many forwards of the head as draft tokens."""
    counts = ended().counts
    lengths = np.asarray(counts.accepted_lengths)
    assert np.all(lengths > 0) and lengths @ (1 + np.arange(MOST + 1)) == NEW.sum()
    rounds = int(ended().num_target_forwards) - int(start().num_target_forwards)
    assert int(counts.num_draft_forwards) == MOST * rounds
    assert int(counts.proposed[0]) == lengths.sum() - 1  # the row with one prompt token had no draft at first


@pytest.mark.slow
def test_no_round_leaves_a_draft_token_in_the_cache():
    """After each round, as tokens are accepted and rejected, and where a stop cuts a draft."""
    state, met = begin(PARAMS, HEAD_PARAMS, start()), set()
    assert_drafters_state(state)
    for _ in range(10):
        before = np.asarray(state.length)
        state = decode(PARAMS, HEAD_PARAMS, state, 1)
        met |= set((np.asarray(state.length) - before).tolist())
        assert_drafters_state(state)
    assert met == {1, 2, 3, 4}
    output = np.asarray(plain().tokens)[2][LENGTHS[2] :]
    for place in (5, 8, 11):
        stops = (int(output[place]), -1)
        state = run(stop_token_ids=stops)
        assert_same(state, plain_decode(PARAMS, start(stop_token_ids=stops)))
        assert_drafters_state(state)


def test_draft_tokens_follow_the_head_s_distribution():
    """Drafts after some rounds, in greedy and sampled rows; for sampled rows also the distribution for the verifier.

    With a penalty on the tokens of the text, the draft's own included.
    """
    state, penalty, temperature = run(max_tokens=5), 2.0, np.array([0.0, 0.7, 1.3])
    sampling = decoding.Sampling.create(3, VOCABULARY, temperature=temperature, frequency_penalty=penalty)
    history = History.start(state.tokens, state.length, vocab_size=VOCABULARY, with_counts=True)
    state = dataclasses.replace(state, sampling=sampling, history=history)
    proposal, _ = jax.jit(MTPHead(MODEL, MOST).propose)(PARAMS, HEAD_PARAMS, state)
    length, tokens, drafted = np.asarray(state.length), np.array(texts_of(state)), np.asarray(proposal.token)[:, 1:]
    for row in range(3):
        tokens[row, length[row] : length[row] + MOST] = drafted[row]
    logits = np.float64(chain_logits(PARAMS, HEAD_PARAMS, jnp.asarray(tokens), length))
    for place in range(1, MOST):
        for row in range(3):
            np.subtract.at(logits[row, place], drafted[row, :place], penalty)
    np.testing.assert_array_equal(drafted[0], logits[0].argmax(axis=1))
    for row in (1, 2):
        weight = np.exp((logits[row] - logits[row].max(axis=1, keepdims=True)) / temperature[row])
        logprobs = np.log(weight / weight.sum(axis=1, keepdims=True))
        # float32 logits of some 10, over 0.7
        np.testing.assert_allclose(proposal.logprobs[row, :MOST], logprobs, atol=1e-4)
    np.testing.assert_array_equal(proposal.is_candidate, np.tile([False, *[True] * MOST], (3, 1)))


@pytest.mark.slow
def test_rows_longer_than_the_training_context():
    """With dynamic rope scaling: a prompt's tokens rotate as in the whole prompt, each further one ends its row."""
    scaled = [
        dataclasses.replace(block.mixer.layer.rope, scaling=DynamicScaling(4.0, 7)) for block in MODEL.config.blocks
    ]
    blocks = tuple(
        block.with_mixer(dataclasses.replace(block.mixer.layer, rope=rope))
        for block, rope in zip(MODEL.config.blocks, scaled, strict=True)
    )
    model = Model(dataclasses.replace(MODEL.config, blocks=blocks))
    head, drafter = mtp_head(model), MTPHead(model, MOST)
    decode = decoding.speculative(model, drafter, ChainRejection())
    sampling = decoding.Sampling.create(3, VOCABULARY, temperature=1.0)
    state = decoding.prefill(
        model, LM.params, PROMPTS, LENGTHS, NEW, np.arange(3), sampling=sampling, stop_token_ids=NO_STOPS
    )
    state, step = jax.jit(decode.start)(LM.params, WEIGHTS, state), jax.jit(decode.step)
    for _ in range(6):
        state = step(LM.params, WEIGHTS, state)
    proposal, _ = jax.jit(drafter.propose)(LM.params, WEIGHTS, state)

    length, tokens = np.asarray(state.length), np.array(texts_of(state))
    for row in range(3):
        tokens[row, length[row] : length[row] + MOST] = proposal.token[row, 1:]

    @jax.jit
    def whole(tokens, row_length):
        """The head's cache update and the logits of the drafts, from scratch."""
        position = jnp.broadcast_to(jnp.arange(CAPACITY, dtype=jnp.int32), tokens.shape)
        hidden = model.normed(LM.params, model.apply(LM.params, tokens, position, row_length=row_length).hidden)
        embedded, rows, logits = model.embed(LM.params, jnp.roll(tokens, -1, axis=1), tokens * 0), jnp.arange(3), []
        made = head.apply(WEIGHTS, embedded, hidden, position, row_length=row_length)[1]
        for place in range(MOST):
            output, _ = head.apply(WEIGHTS, embedded, hidden, position, row_length=row_length)
            last = output[rows, length - 2 + place]
            logits.append(model.read_out(LM.params, last[:, None])[:, 0])
            hidden = hidden.at[rows, length - 1 + place].set(last)
        return made, jax.nn.log_softmax(jnp.stack(logits, axis=1))

    row_length = np.maximum(LENGTHS[:, None], 1 + np.arange(CAPACITY)[None, :])
    assert LENGTHS[1] > 7 and np.all(length > LENGTHS + 5) and np.any(length > 7)
    (made, logprobs), own = whole(jnp.asarray(tokens), jnp.asarray(row_length, jnp.int32)), state.draft[0]
    for row in range(3):
        for name in ("latent", "rope_key"):
            got, want = (np.asarray(getattr(one, name))[row, : length[row] - 1] for one in (own, made))
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)
    np.testing.assert_allclose(proposal.logprobs[:, :MOST], logprobs, atol=1e-4)  # float32 logits of some 10


def test_prefill_in_many_chunks_gives_the_same_state(monkeypatch):
    monkeypatch.setattr(chunked_prefill, "DRAFT_CHUNK_TOKENS", 5)  # neither buffer nor prompts are multiples of it
    state = start()
    draft = jax.jit(MTPHead(MODEL).start)(PARAMS, HEAD_PARAMS, state)
    assert_drafters_state(dataclasses.replace(state, draft=draft))


def test_a_nonfinite_head_costs_speed_and_changes_no_token():
    nonfinite = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), HEAD_PARAMS)
    state = run(head=nonfinite)
    assert_same(state, plain())
    assert not np.any(state.failed) and int(state.counts.proposed[0]) == 0 == int(state.draft[0].length.max())
    # Non-finite for a while: rows whose cache misses tokens draft nothing any more, the one that misses none does.
    state = decode(PARAMS, HEAD_PARAMS, begin(PARAMS, nonfinite, start()), 1000)
    assert_same(state, plain())
    np.testing.assert_array_equal(state.draft[0].length, [0, 0, state.length[2] - 1])
    assert_drafters_state(state, (2,))


def test_a_nonfinite_row_leaves_the_others_unchanged():
    """One row's prompt holds a token whose embedding is NaN; no other row emits it."""
    written = {*np.asarray(plain().tokens).ravel().tolist(), *PROMPTS.ravel().tolist()}
    token = next(token for token in range(VOCABULARY) if token not in written)
    nonfinite = PARAMS | {"embedding": PARAMS["embedding"].at[token].set(jnp.nan)}
    prompts = PROMPTS.copy()
    prompts[1, 4] = token
    state = run(params=nonfinite, prompts=prompts)
    np.testing.assert_array_equal(state.failed, [False, True, False])
    np.testing.assert_array_equal(state.tokens[0], plain().tokens[0])
    np.testing.assert_array_equal(state.tokens[2], plain().tokens[2])
    assert_drafters_state(state, (0, 2))


@pytest.mark.slow
def test_runs_in_bfloat16():
    """Nothing is promoted silently: shapes and dtypes of a round, without running it."""
    narrow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), (PARAMS, HEAD_PARAMS))
    speculation = decoding.speculative(MODEL, MTPHead(MODEL, 2), ChainRejection())
    state = start()
    state = dataclasses.replace(state, caches=MODEL.empty_cache(*state.tokens.shape, jnp.bfloat16))
    out = jax.eval_shape(lambda *parts: speculation.step(*parts, speculation.start(*parts, state)), *narrow)
    assert out.draft[0].latent.dtype == out.draft[1].output.dtype == jnp.bfloat16


def copy_of(folder, changed):
    """The golden folder with other tensors."""
    shutil.copy(FOLDER / "config.json", folder)
    save_file(changed(load_file(FOLDER / "model.safetensors")), folder / "model.safetensors")
    return folder


def without(pattern, tensors):
    return {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


COPIES = r"layers\.2\.(embed_tokens|shared_head\.head)"


def test_the_copies_of_embedding_and_head_may_be_absent(tmp_path):
    stored = load_file(FOLDER / "model.safetensors")
    assert len(without(COPIES, stored)) == len(stored) - 2
    folder = copy_of(tmp_path, partial(without, COPIES))
    jax.tree.map(np.testing.assert_array_equal, load_mtp_head(folder, MODEL, dtype="float32"), WEIGHTS)
    mesh = jax.make_mesh((1,), ("tensor",))
    placed = load_mtp_head(folder, dataclasses.replace(MODEL, execution=Execution(mesh=mesh)), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, placed, WEIGHTS)
    assert all(leaf.sharding.mesh.axis_names == ("tensor",) for leaf in jax.tree.leaves(placed))
    named = METHODS["mtp"](2).build(LM, folder)
    jax.tree.map(np.testing.assert_array_equal, named.draft_params, WEIGHTS)
    assert named.drafter == MTPHead(MODEL, 2) and METHODS["mtp"]().build(LM).drafter.num_tokens == 1


@pytest.mark.slow
def test_by_name(golden, tmp_path):
    """In the library, from the model's own folder, and at the command line, which finds the head as well."""
    prompts = [row[:length] for row, length in zip(golden["tokens"], golden["length"], strict=True)]
    out = decodax.generate(LM, prompts, max_new_tokens=NAMED, stop_token_ids=[], strategy="mtp")
    texts = np.stack([np.resize(np.concatenate(row), CAPACITY) for row in zip(prompts, out.tokens, strict=True)])
    hidden = target_of(LM.params, jnp.asarray(texts, jnp.int32))[1]
    greedy = np.asarray(MODEL.read_out(LM.params, hidden)).argmax(axis=2)
    for row, length in enumerate(golden["length"]):
        np.testing.assert_array_equal(out.tokens[row], greedy[row, length - 1 : length - 1 + NAMED])
    assert out.stats.strategy == "mtp" and out.stats.draft_forwards == out.stats.target_forwards > 0
    assert len(out.stats.proposed) == 1 and out.stats.proposed[0] > 0
    folder = copy_of(tmp_path, partial(without, r"layers\.2\."))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(folder / "tokenizer.json"))
    done = CliRunner().invoke(cli, ["generate", "ab", "--model", str(folder), "--strategy", "mtp"])
    assert done.exit_code != 0 and "hold no MTP head" in done.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (partial(without, r"layers\.2\."), r"hold no MTP head \(no tensor is called model.l"),
        (partial(without, r"layers\.2\.hnorm"), r"missing: model\.layers\.2\.hnorm\.weight \[30\]"),
        (lambda tensors: tensors | {"model.layers.2.eh_proj.bias": np.zeros(30, np.float32)}, r"surplus: .*eh_proj\.b"),
        (lambda tensors: tensors | {"model.layers.2.eh_proj.weight": np.zeros((60, 30), np.float32)}, "misshapen"),
    ],
)
def test_files_without_an_mtp_head_are_refused(tmp_path, changed, message):
    folder = copy_of(tmp_path, changed)
    with pytest.raises(ValueError, match=message):
        METHODS["mtp"]().build(LM, folder)


def test_what_does_not_fit_is_refused():
    other = load_golden("deepseek_v3").folder
    with pytest.raises(ValueError, match="must hold the model that its MTP head drafts for"):
        METHODS["mtp"]().build(LM, str(other))
    llama = load(load_golden("llama").folder, dtype="float32")
    with pytest.raises(ValueError, match="llama models have no MTP head"):
        METHODS["mtp"]().build(llama)
    with pytest.raises(ValueError, match="pass draft=FOLDER"):
        METHODS["mtp"]().build(LM, LM)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        MTPHead(MODEL, 0)
    drafter = MTPHead(MODEL)
    drafter.check(MODEL, WEIGHTS)
    with pytest.raises(ValueError, match="drafts for the model whose checkpoint holds it"):
        drafter.check(llama.model, WEIGHTS)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), WEIGHTS)
    with pytest.raises(ValueError, match="must have the model's dtype float32, got bfloat16: `load_mtp_head"):
        jax.eval_shape(drafter.start, LM.params, rounded, run(max_tokens=1))
    for head in (None, {}, WEIGHTS | {"join": WEIGHTS["join"].T}):
        with pytest.raises(ValueError, match="must be the weights of this model's MTP head"):
            drafter.check(MODEL, head)
