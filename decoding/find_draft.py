"""Finds the draft model for a target, and checks that their vocabularies match."""

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from decodax.core.arguments import folder_name, shown
from decodax.core.printable import printable
from decodax.decoding.auxiliary_check import SHARE, SHARES, check_value
from decodax.decoding.draft_vocabulary import in_target_vocabulary
from decodax.models.checkpoints.model_files import find_file, read_json_object, stamp
from decodax.models.load import LanguageModel, find_folder, load
from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.sharding.rules import DATA

FACTS_FILE = "draft.json"
# A draft is small: communication would take longer than sharding it would save, so every device has all of it, for its
# own rows.
DRAFT_RULES = DATA
# For a draft without measurements: share of positions at which its r-th token is the target's.
TYPICAL_RANKS = (0.6, 0.14, 0.06, 0.04)


@dataclass(frozen=True)
class Draft:
    """A draft model and what its `draft.json` says.

    lm: the model, on the target's devices.
    acceptance: probability that its most probable token is the target's, if known.
    rank_acceptance: the same for its first, second, ... token.
    """

    lm: LanguageModel
    acceptance: float | None
    rank_acceptance: tuple[float, ...]


def find_draft(strategy: str, lm: LanguageModel, draft: Any) -> Draft:
    """The draft given, as a folder, a hub id or a loaded model, or that of the embedded model.

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
            draft = _load(str(found), stamp(found), lm.dtype.name, lm.model.execution.mesh)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"draft: {error}") from error
    _check_tokens(lm, draft)
    draft = _on_devices_of(lm, draft)
    model = in_target_vocabulary(draft.model, lm.model.vocab_size)
    draft = dataclasses.replace(draft, model=model)
    facts = _facts(draft.path)
    ranks = tuple(facts.get("rank_acceptance", TYPICAL_RANKS))
    return Draft(draft, facts.get("greedy"), ranks)


@lru_cache(maxsize=4)
def _load(path: str, files: Hashable, dtype: str, mesh: Mesh | None) -> LanguageModel:
    """The draft in a folder, which is read again when its files have changed."""
    return load(path, dtype=dtype, mesh=mesh, rules=DRAFT_RULES)


def _on_devices_of(lm: LanguageModel, draft: LanguageModel) -> LanguageModel:
    """The draft on the devices of the model."""
    execution = lm.model.execution
    if execution.mesh is None or draft.model.execution.mesh is not None:
        return draft
    own = dataclasses.replace(draft.model.execution, mesh=execution.mesh, rules=DRAFT_RULES)
    model = dataclasses.replace(draft.model, execution=own)
    return dataclasses.replace(draft, model=model, params=own.replicated(draft.params))


def _facts(folder: Path) -> dict[str, Any]:
    """The draft's measurements on held-out text; empty without the file."""
    file = find_file(folder, FACTS_FILE)
    facts = {} if file is None else read_json_object(file).get("heldout", {})
    if not isinstance(facts, dict):
        raise ValueError(f"heldout in {printable(file)} must be an object, got {printable(repr(facts))}")
    for name, check in {"greedy": SHARE, "rank_acceptance": SHARES}.items():
        if name in facts:
            check_value(f"heldout.{name} in {printable(file)}", facts[name], check)
    return facts


def _check_tokens(lm: LanguageModel, draft: LanguageModel) -> None:
    """Raises ValueError where an id is another token in each; without two tokenizers, where the sizes differ."""
    target_size, draft_size = lm.config.vocab_size, draft.config.vocab_size
    advice = "choose a draft made for this model, or train one with `decodax train draft`"
    if lm.tokenizer is None or draft.tokenizer is None:
        if target_size != draft_size:
            raise ValueError(
                f"a draft without a tokenizer must have the model's vocabulary of {target_size} tokens, got "
                f"{draft_size} in {draft.path.name}: {advice}"
            )
        return
    other = _first_difference(lm.tokenizer, draft.tokenizer, min(target_size, draft_size))
    if other is not None:
        token, of_model, of_draft = other
        raise ValueError(
            f"a draft must have the model's tokenizer, but token {token} is {shown(of_model)} in {lm.path.name} and "
            f"{shown(of_draft)} in {draft.path.name}: {advice}"
        )


@lru_cache(maxsize=4)  # comparing 100,000 tokens takes long, and every call of `generate` needs it
def _first_difference(of_model: Tokenizer, of_draft: Tokenizer, num_common: int) -> tuple[int, str, str] | None:
    """The first id that is another token in each, with both; ids that only one of them uses are ignored."""
    for token in range(num_common):
        one, other = of_model.backend.id_to_token(token), of_draft.backend.id_to_token(token)
        if one is not None and other is not None and one != other:
            return token, one, other
    return None
