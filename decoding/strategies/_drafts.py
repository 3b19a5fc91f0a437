"""Finds the draft that goes with a model, and checks that the two fit."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from decodax.arguments import folder_name, shown
from decodax.decoding.draft_vocabulary import in_target_vocabulary
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


def find_draft(strategy: str, lm: LanguageModel, draft: Any) -> Draft:
    """The draft given, as a folder, a hub id or a loaded model, or the one that comes with the embedded model.

    Its vocabulary may be of another size (`decoding/draft_vocabulary.py`).

    Raises ValueError when there is none, or when an id that both have is another token in each.
    """
    if draft is None:
        if lm.path != find_folder(None):
            raise ValueError(
                f"strategy {strategy!r} needs a draft for {lm.path.name}: pass draft=FOLDER "
                "(`decodax train draft` makes one)"
            )
        draft = lm.path / "draft"
    if not isinstance(draft, LanguageModel):
        found = folder_name("draft", draft, f" or a loaded model (for strategy {strategy!r})")
        try:
            draft = _load(str(found), jax.tree.leaves(lm.params)[0].dtype.name, lm.model.execution.mesh)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"draft: {error}") from error
    _check_tokens(lm, draft)
    draft = _beside(lm, draft)
    model = in_target_vocabulary(draft.model, lm.model.vocab_size)
    draft = dataclasses.replace(draft, model=model)
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


def _check_tokens(lm: LanguageModel, draft: LanguageModel) -> None:
    """The same token behind every id that both have; where one has no tokenizer to compare, at least equal sizes."""
    wanted, found = lm.config.vocab_size, draft.config.vocab_size
    advice = "choose a draft made for this model, or train one with `decodax train draft`"
    if lm.tokenizer is None or draft.tokenizer is None:
        if wanted != found:
            raise ValueError(
                f"a draft without a tokenizer must have the model's vocabulary of {wanted} tokens, got {found} in "
                f"{draft.path.name}: {advice}"
            )
        return
    other = _first_difference(lm.tokenizer, draft.tokenizer, min(wanted, found))
    if other is not None:
        token, of_model, of_draft = other
        raise ValueError(
            f"a draft must have the model's tokenizer, but token {token} is {shown(of_model)} in {lm.path.name} and "
            f"{shown(of_draft)} in {draft.path.name}: {advice}"
        )


@lru_cache(maxsize=4)  # a vocabulary of 100,000 takes long to compare, and `generate` asks at every call
def _first_difference(of_model: Tokenizer, of_draft: Tokenizer, num_common: int) -> tuple[int, str, str] | None:
    """The first id that is another token in each, with both; ids that only one of them uses make no difference."""
    for token in range(num_common):
        one, other = of_model.backend.id_to_token(token), of_draft.backend.id_to_token(token)
        if one is not None and other is not None and one != other:
            return token, one, other
    return None
