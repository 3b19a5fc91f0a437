"""What a strategy built for a model is kept: it is built again for other arguments and for changed files only."""

import dataclasses
import gc
import json
import weakref
from typing import ClassVar

import numpy as np
import pytest

from decodax.decoding import Speculation, built_strategies
from decodax.decoding.built_strategies import MAX_BUILT, build_once, on_devices_of
from decodax.decoding.drafters import PromptLookup
from decodax.decoding.strategies import DraftingStrategy
from decodax.decoding.verifiers import ExactMatch
from decodax.models.load import load
from tests.golden_files import load_golden


@dataclasses.dataclass(frozen=True)
class Counted(DraftingStrategy):
    """Counts how often it is built."""

    can_measure = True
    made: ClassVar[list] = []

    def build(self, lm, draft=None, batch_size=1):
        Counted.made.append((draft, self.draft_tokens, batch_size))
        return Speculation(PromptLookup(3), ExactMatch(), {"weight": np.ones(3, np.float32)})


@pytest.fixture
def lm():
    Counted.made.clear()
    return dataclasses.replace(load(load_golden("llama").folder))


def count(lm, draft, draft_tokens, batch_size):
    build_once(Counted(draft_tokens), lm, draft, batch_size)
    return len(Counted.made)


def test_the_same_arguments_are_built_once(lm):
    assert [count(lm, None, 3, batch) for batch in (1, 1, 8)] == [1, 1, 1]
    assert build_once(Counted(3), lm, None, 1) is build_once(Counted(3), lm, None, 2)
    assert count(lm, None, 4, 1) == 2
    assert [count(lm, None, "auto", batch) for batch in (1, 8, 1, 8)] == [3, 4, 4, 4]  # measured for each batch
    draft, other = np.ones(2), np.ones(2)
    assert [count(lm, given, 3, 1) for given in (draft, draft, other)] == [5, 5, 6]
    assert count(dataclasses.replace(lm), None, 3, 1) == 7  # another model


def test_a_folder_is_read_again_when_its_files_change(lm, tmp_path):
    file = tmp_path / "auxiliary.json"
    file.write_text(json.dumps({}))
    assert [count(lm, given, 3, 1) for given in (tmp_path, str(tmp_path), tmp_path)] == [1, 1, 1]
    file.write_text(json.dumps({"changed": True}))
    assert [count(lm, tmp_path, 3, 1) for _ in range(2)] == [2, 2]
    assert [count(lm, "org/name", 3, 1) for _ in range(2)] == [3, 3]


def test_few_are_kept_and_none_beyond_the_model(lm):
    lm = dataclasses.replace(lm)  # that no fixture holds
    for number in range(1, MAX_BUILT + 2):
        assert count(lm, None, number, 1) == number
    assert count(lm, None, 2, 1) == MAX_BUILT + 1 and count(lm, None, 1, 1) == MAX_BUILT + 2
    kept = weakref.ref(build_once(Counted(1), lm, None, 1))
    assert len(built_strategies._built[lm]) == MAX_BUILT
    del lm
    gc.collect()
    assert kept() is None


def test_a_strategy_made_by_hand_is_put_on_the_devices_once(lm):
    made = Counted().build(lm)
    assert on_devices_of(lm, made) is on_devices_of(lm, made)
    assert on_devices_of(lm, made).drafter == made.drafter
    assert on_devices_of(lm, Counted().build(lm)) is not on_devices_of(lm, made)


@pytest.mark.parametrize("built", [None, 3])
def test_what_builds_no_speculation_is_refused(lm, built):
    class Careless(Counted):
        def build(self, lm, draft=None, batch_size=1):
            return built

    with pytest.raises(ValueError, match=rf"what Careless.build returns must be a Speculation.*, got {built}"):
        build_once(Careless(2), lm, None, 1)
