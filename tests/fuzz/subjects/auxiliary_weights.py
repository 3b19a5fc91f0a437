"""Damages auxiliary weights (auxiliary.json, auxiliary.safetensors) and drafts (draft.json); strategies load them."""

import json
import shutil
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decodax.decoding.strategies import METHODS
from decodax.models.load import LanguageModel, load
from tests.fuzz.damage import Allowed, Damage, byte_damages, text_damages, tree_damages
from tests.fuzz.folders import packed, tensors_of
from tests.fuzz.verdict import Case, WrongResult

_DEMO = Path(__file__).parents[3] / "models" / "demo"
_FACTS, _WEIGHTS = "auxiliary.json", "auxiliary.safetensors"
_STRATEGIES = ("ppd", "specee", "medusa", "kangaroo", "first", "skip_decode")


@cache
def _model() -> LanguageModel:
    return load()


def cases(work: Path) -> Iterator[Case]:
    for strategy in _STRATEGIES:
        facts = (_DEMO / strategy / _FACTS).read_bytes()
        weights = (_DEMO / strategy / _WEIGHTS).read_bytes()
        for damage in (*tree_damages(json.loads(facts)), *text_damages(facts), *byte_damages(facts, range(36))):
            yield _case(work, strategy, _FACTS, damage)
        for damage in (*_weights(weights), *byte_damages(weights, range(36))):
            yield _case(work, strategy, _WEIGHTS, damage)
    facts = (_DEMO / "draft" / "draft.json").read_bytes()
    for damage in (*tree_damages(json.loads(facts)), *text_damages(facts), *byte_damages(facts, range(36))):
        yield _case(work, "draft_model", "draft.json", damage)


def _weights(content: bytes) -> Iterator[Damage]:
    tensors = tensors_of(content)
    for name in dict.fromkeys((*list(tensors)[:2], *list(tensors)[-1:])):
        kind, shape, numbers = tensors[name]
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        whole = {2: "I16", 4: "I32"}[len(numbers) // int(np.prod(shape))]
        nan = b"\xff" * len(numbers)
        yield Damage(f"without:{name}", packed(rest), Allowed.NOTHING)
        yield Damage(f"renamed:{name}", packed(rest | {"zzz": tensors[name]}), Allowed.NOTHING)
        yield Damage(f"nested:{name}", packed(tensors | {f"{name}.more": tensors[name]}), Allowed.NOTHING)
        yield Damage(f"whole numbers:{name}", packed(tensors | {name: (whole, shape, numbers)}), Allowed.NOTHING)
        yield Damage(f"NaN:{name}", packed(tensors | {name: (kind, shape, nan)}))
        others = ([*shape, 1], [int(np.prod(shape))], shape[::-1], [1, *shape])
        for changed in [list(one) for one in dict.fromkeys(map(tuple, others)) if list(one) != shape]:
            yield Damage(f"shape {changed}:{name}", packed(tensors | {name: (kind, changed, numbers)}), Allowed.NOTHING)
    for extra in ("", ".", "a..b", "\x1b[2J", "surplus"):
        one = next(iter(tensors.values()))
        yield Damage(f"surplus {extra.encode('unicode_escape').decode()!r}", packed(tensors | {extra: one}))


def _case(work: Path, strategy: str, name: str, damage: Damage) -> Case:
    named = ((name, f"part-{strategy}"),)
    act = partial(_build, work, strategy, name, damage)
    return Case(f"auxiliary_weights/{strategy}/{name} {damage.kind}", act, named, given=partial(_content, damage))


def _content(damage: Damage) -> bytes:
    return damage.content if isinstance(damage.content, bytes) else json.dumps(damage.content).encode()


def _build(work: Path, strategy: str, name: str, damage: Damage) -> None:
    folder = work / f"part-{strategy}"
    if not folder.exists():
        shutil.copytree(_DEMO / ("draft" if name == "draft.json" else strategy), folder)
    right = (folder / name).read_bytes()
    try:
        (folder / name).unlink()  # anew, because the file may still be mapped
        (folder / name).write_bytes(_content(damage))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built: Any = METHODS[strategy]().build(_model(), str(folder))
    finally:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(right)
    if damage.allowed is Allowed.NOTHING:
        raise WrongResult("built, and should have been refused")
    if "NaN" in damage.kind and not caught:
        raise WrongResult("NaN among the weights, and not a word of it")
    fields = ("draft_params", "params")
    wanted = _shapes(_undamaged(strategy), fields)
    if (found := _shapes(built, fields)) != wanted:
        raise WrongResult(
            f"built with weights of other shapes than the undamaged part: {_first_difference(found, wanted)}"
        )


@cache
def _undamaged(strategy: str) -> Any:
    return METHODS[strategy]().build(_model())


def _shapes(built: Any, fields: tuple[str, ...]) -> list[tuple[str, Any, str]]:
    trees = {name: getattr(built, name, None) for name in fields}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return [(jax.tree_util.keystr(path), np.shape(leaf), str(leaf.dtype)) for path, leaf in leaves]


def _first_difference(found: list[Any], wanted: list[Any]) -> str:
    return str(next(pair for pair in zip([*found, None], [*wanted, None], strict=False) if pair[0] != pair[1]))
