"""Finds the draft that goes with a model, and checks that the two fit."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from decodax.decoding.part_check import SHARE, SHARES, check_value
from decodax.models.load import LanguageModel, find_folder, load
from decodax.models.model_files import find_file, printable, read_json_object
from decodax.models.tokenizer import Tokenizer
from decodax.sharding.rules import DATA

FACTS_FILE = "draft.json"
# A draft is small, and what its devices would have to tell each other takes longer than what they would save: each has
# all of it, for its own rows.
DRAFT_RULES = DATA
# Of a draft about which nothing is known: shares of positions at which its r-th guess is the target's token.
TYPICAL_RANKS = (0.6, 0.14, 0.06, 0.04)


@dataclass(frozen=True)
class Draft:
    """A draft with what its `draft.json` says. acceptance: chance that its likeliest token is the target's, if known.

    rank_acceptance: the same for its first, second, ... guess.
    """

    lm: LanguageModel
    acceptance: float | None
    rank_acceptance: tuple[float, ...]


def find_draft(strategy: str, lm: LanguageModel, draft: str | Path | LanguageModel | None) -> Draft:
    """The draft given, or the one that comes with the embedded model.

    Raises ValueError when there is none, or when its vocabulary is not the model's.
    """
    if draft is None:
        if lm.path != find_folder(None):
            raise ValueError(
                f"strategy {strategy!r} needs a draft for {lm.path.name}: pass draft=FOLDER "
                "(`decodax train draft` makes one)"
            )
        draft = lm.path / "draft"
    if not isinstance(draft, LanguageModel):
        draft = _load(str(draft), jax.tree.leaves(lm.params)[0].dtype.name, lm.model.execution.mesh)
    draft = _beside(lm, draft)
    _check_vocabulary(lm, draft)
    facts = _facts(draft.path)
    ranks = tuple(facts.get("rank_acceptance", TYPICAL_RANKS))
    return Draft(draft, facts.get("greedy"), ranks)


@lru_cache(maxsize=4)
def _load(path: str, dtype: str, mesh: Mesh | None) -> LanguageModel:
    return load(path, dtype=dtype, mesh=mesh, rules=DRAFT_RULES)


def _beside(lm: LanguageModel, draft: LanguageModel) -> LanguageModel:
    """The draft on the devices of the model."""
    execution = lm.model.execution
    if execution.mesh is None or draft.model.execution.mesh is not None:
        return draft
    own = dataclasses.replace(draft.model.execution, mesh=execution.mesh, rules=DRAFT_RULES)
    model = dataclasses.replace(draft.model, execution=own)
    return dataclasses.replace(draft, model=model, params=own.joined(draft.params))


def _facts(folder: Path) -> dict[str, Any]:
    """What a draft's file says was measured on held-out text; nothing without the file."""
    file = find_file(folder, FACTS_FILE)
    facts = {} if file is None else read_json_object(file).get("heldout", {})
    if not isinstance(facts, dict):
        raise ValueError(f"heldout in {printable(file)} must be an object, got {printable(repr(facts))}")
    for name, check in {"greedy": SHARE, "rank_acceptance": SHARES}.items():
        if name in facts:
            check_value(f"heldout.{name} in {printable(file)}", facts[name], check)
    return facts


def _check_vocabulary(lm: LanguageModel, draft: LanguageModel) -> None:
    """Equal sizes, and where both have a tokenizer, the same token behind every id."""
    wanted, found = lm.config.vocab_size, draft.config.vocab_size
    if wanted != found:
        raise ValueError(
            f"a draft must have the model's vocabulary of {wanted} tokens, got {found} in {draft.path.name}: choose a "
            "draft made for this model, or train one with `decodax train draft`"
        )
    if lm.tokenizer is None or draft.tokenizer is None:
        return
    other = _first_difference(lm.tokenizer, draft.tokenizer, wanted)
    if other is not None:
        raise ValueError(
            f"a draft must have the model's tokenizer, but token {other} is another one in {draft.path.name}: choose a "
            "draft made for this model, or train one with `decodax train draft`"
        )


@lru_cache(maxsize=4)  # a vocabulary of 100,000 takes long to compare, and `generate` asks at every call
def _first_difference(of_model: Tokenizer, of_draft: Tokenizer, vocab_size: int) -> int | None:
    one, other = of_model.backend, of_draft.backend
    return next((token for token in range(vocab_size) if one.id_to_token(token) != other.id_to_token(token)), None)
