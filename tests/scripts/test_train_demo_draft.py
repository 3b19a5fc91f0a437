"""The script that made the shipped draft, on a tiny target; and the shipped draft on held-out code."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding.training.distillation import AcceptanceMeter
from decodax.decoding.training.texts import Texts
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from decodax.scripts import demo_corpus, train_demo_draft
from decodax.scripts.demo_corpus import HELDOUT_PACKAGES, Corpus, Document
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]


def test_the_texts_follow_the_split_of_the_embedded_model(monkeypatch):
    def document(name, is_test):
        return Document(f"{name}.py", name, f"import {name}\n" * 3, is_test)

    corpus = Corpus([document("ast", False), document("ast", True)], [document("json", False), document("json", True)])
    monkeypatch.setattr(demo_corpus, "collect", lambda: corpus)
    lm = decodax.load()
    texts = train_demo_draft.demo_texts(lm)
    assert texts.separator == (0,) and texts.rotating_share == train_demo_draft.TEST_SHARE
    decoded = [
        [lm.tokenizer.decode(ids.tolist()) for ids in split] for split in (texts.train, texts.rotating, texts.heldout)
    ]
    assert decoded == [["import ast\n" * 3], ["import ast\n" * 3], ["import json\n" * 3]]


def test_the_script_trains_writes_and_resumes(tmp_path, monkeypatch, capsys):
    model, params = tiny_model()
    target = LanguageModel(model, model.config, params, None, Path("tiny"), (0,))
    ids = [np.random.default_rng(i).integers(1, 37, size=60).astype(np.int32) for i in range(4)]
    monkeypatch.setattr(train_demo_draft, "load", lambda dtype: target)
    monkeypatch.setattr(train_demo_draft, "demo_texts", lambda target: Texts(ids[:3], ids[3:]))
    small = replace(train_demo_draft.SHAPE, hidden_size=12, layers=1, head_size=6, feed_forward=17)
    monkeypatch.setattr(train_demo_draft, "SHAPE", small)
    plan = replace(train_demo_draft.PLAN, window_tokens=14, short_tokens=14, optimizer="adamw")
    monkeypatch.setattr(train_demo_draft, "PLAN", plan)
    folders = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--image", str(tmp_path / "loss.png")]
    for steps in (2, 3):
        train_demo_draft.main([*folders, "--steps", str(steps)])
        facts = json.loads(capsys.readouterr().out)
        assert facts["trained_tokens"] == steps * 4 * 14
        assert decodax.load(tmp_path / "out").config.hidden_size == 12
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_draft_is_small_fits_the_embedded_model_and_was_not_trained_on_held_out_code():
    folder = train_demo_draft.DRAFT_FOLDER
    lm, draft, facts = decodax.load(), decodax.load(folder), json.loads((folder / "draft.json").read_text())
    assert sum(leaf.size for leaf in jax.tree.leaves(draft.params)) == facts["num_parameters"] < 750_000
    assert draft.config.vocab_size == lm.config.vocab_size == facts["target_vocab_size"]
    assert draft.config.max_position_embeddings == lm.config.max_position_embeddings
    assert draft.tokenizer is None and draft.end_token_ids == lm.end_token_ids
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
    # Two tokens per target forward at draft length four are required: (1 - a^5) / (1 - a) = 2 at a = 0.5187.
    assert facts["heldout"]["tokens"] >= 50_000 and facts["heldout"]["greedy"] > 0.5187
    assert "textwrap" in HELDOUT_PACKAGES
    ids = np.asarray(lm.tokenizer.encode(Path(textwrap.__file__).read_text()), np.int32)[: 4 * 256 + 1]
    windows = np.stack([ids[i : i + 257] for i in range(0, 1024, 256)])
    found = AcceptanceMeter(lm.model, Model(draft.config))(lm.params, draft.params, windows)
    assert found.greedy > 0.4 and found.sampling > 0.45
