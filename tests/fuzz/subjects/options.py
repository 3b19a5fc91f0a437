"""Draws options and prompts of `generate` at random, of right and wrong types and sizes.

A call raises a one-line error that names a passed option, or gives a generation for which all relations of
`tests/fuzz/metamorphic.py` hold. Right options must not be refused.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models

import decodax
from decodax.models.load import LanguageModel
from tests.fuzz import metamorphic
from tests.fuzz.folders import GOLDEN, WEIGHTS, config_of
from tests.fuzz.verdict import PROMISED, Case, WrongResult

_BASE = "llama"
_PROMPTS = ([5, 6, 7], [9, 11], [3, 13, 17, 19, 23])
_SECONDS = 15.0  # three programs may have to be compiled
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;!?-+\né日"

# Right values, which compile nothing new except where the set of options is new.
_RIGHT: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "max_new_tokens": (1, 2, 5, 9),
    "temperature": (0.0, 0, 0.7, 1, [0.0, 0.5, 1.3], np.float32(0.5)),
    "top_k": (None, 0, -1, 1, 5, [1, 2, 3]),
    "top_p": (None, 1.0, 0.5, [0.1, 0.5, 1.0]),
    "min_p": (None, 0.0, 0.1),
    "typical_p": (None, 1.0, 0.5),
    "repetition_penalty": (None, 1.0, 1.3),
    "presence_penalty": (None, 0.0, 0.5, -0.5),
    "frequency_penalty": (None, 0.0, 0.5),
    "logit_bias": (None, {}, {5: 100.0}, {7: -100.0}, [{5: 1.0}, None, {}]),
    "min_new_tokens": (0, 1, 3),
    "stop": ((), [], "a", ["b", "zz"], ("é", "日a")),
    "stop_token_ids": (None, [], [5], [7, 9, 11], (3,)),
    "seed": (0, 1, 2**31, [1, 2, 3], np.arange(3)),
    "strategy": (None, "autoregressive", "prompt_lookup"),
    "block_tokens": (1, 2, 16),
}
_NAMES = (*_RIGHT, "draft", "draft_tokens", "on_text")
# Other values: an option "not given", other libraries' types, and nonsense.
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 1e300, float("nan"), float("inf"), 10**9, 2**40, 2**63, 10**400),
    *("", "5", "auto", "greedy", "\x1b[2J", "\ud800", b"a", [], (), {}, [None], [[1]], ["a"], [1, 2], [1, 2, 3, 4]),
    *({"a": 1}, {5: "x"}, {10**9: 1.0}, {-1: 1.0}, {5: float("nan")}, {1, 2}, 1j, object, len),
    *(np.int64(5), np.float64(0.5), np.array(3), np.array([1, 2, 3]), np.zeros((2, 2)), np.array("a"), np.bool_(True)),
    *(range(3), np.datetime64("2020-01-01"), float, [float("nan")] * 3, [1, "a", None], "x" * 100_000),
)
_JAX_ODD = ((5,), (3.0,), ([1, 2, 3],), ([[1.0]],))  # made arrays when they are used
_ODD_PROMPTS: tuple[Any, ...] = (
    *(None, 5, True, [], "", [[]], [5, "a"], [[5], "a", None], {"a": 1}, {5}, b"abc", [b"abc"], np.array("a"), 2.5),
    *(
        [[2.5]],
        [[True]],
        [[-1]],
        [[67]],
        [[10**9]],
        [[2**63]],
        [[10**400]],
        [[None]],
        [[[5]]],
        np.zeros((1, 2, 3), int),
    ),
    *(
        "\ud800",
        "a" * 100_000,
        [[5]] * 2 + [[]],
        object,
        len,
        range(3),
        [range(5, 8)],
        np.array([[5, 6]]),
        float("nan"),
    ),
    *([[5] * 63], [[5] * 64], [[5] * 65], (5, 6), ([5, 6],), [np.int64(5)], "日本", "\x00"),
)


@cache
def model_with_tokenizer(work: Path) -> LanguageModel:
    """A golden model with a tokenizer of one character per token."""
    folder = work / "with_tokenizer"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(GOLDEN / _BASE / WEIGHTS, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config_of(_BASE) | {"eos_token_id": 2}))
    vocabulary = {name: index for index, name in enumerate(("<unk>", "<s>", "</s>", *_CHARACTERS[:64]))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return decodax.load(folder)


def cases(work: Path) -> Iterator[Case]:
    """Each option with each odd value, the prompts, unknown options, and then random draws."""
    for option in _NAMES:
        for index, value in enumerate((*_ODD, *_JAX_ODD)):
            if _is_function_of_the_users(option, value):
                continue
            options = {"strategy": "prompt_lookup"} if option == "draft_tokens" else {}
            options |= {"max_new_tokens": 5} | {option: value}
            jax_value = index >= len(_ODD)
            yield _case(work, f"odd {option}:{index}", options, is_right=False, jax_value=jax_value, named=(option,))
    for index, prompts in enumerate(_ODD_PROMPTS):
        act = partial(_prompts, work, prompts)
        yield Case(
            f"options/{_BASE}/prompts:{index}",
            act,
            (("prompt", "token"),),
            promised=(*PROMISED, TypeError),
            given=repr(prompts)[:1_000].encode(errors="replace"),
            seconds=_SECONDS,
        )
    for name in ("max_token", "Temperature", "top k", "", "\x1b[2J", "self", "lm"):
        yield _case(work, f"unknown {name!r}", {name: 1}, is_right=False)
    for seed in range(160):
        rng = np.random.default_rng(seed)
        yield _case(work, f"right:{seed}", _draw(rng, 0), is_right=True, seed=seed)
    for seed in range(400):
        rng = np.random.default_rng([1, seed])
        yield _case(work, f"mixed:{seed}", _draw(rng, int(rng.integers(1, 3))), is_right=False)


def _is_function_of_the_users(option: str, value: Any) -> bool:
    """An error it raises when called is the user's own, and passes unchanged."""
    return callable(value) and (option == "on_text" or (option == "strategy" and not isinstance(value, type)))


def _draw(rng: np.random.Generator, num_odd: int) -> dict[str, Any]:
    """Some options with right values, `num_odd` of them with odd ones; few tokens."""
    chosen = rng.choice(list(_RIGHT), rng.integers(1, 5), replace=False)
    options = {str(name): _RIGHT[name][int(rng.integers(len(_RIGHT[name])))] for name in chosen}
    for name in rng.choice(list(_RIGHT), num_odd, replace=False):
        options[str(name)] = _ODD[int(rng.integers(len(_ODD)))]
    return {"max_new_tokens": 5} | options


def _case(
    work: Path,
    kind: str,
    options: dict[str, Any],
    *,
    is_right: bool,
    jax_value: bool = False,
    seed: int | None = None,
    named: tuple[str, ...] = (),
) -> Case:
    act = partial(_generate, work, options, is_right, jax_value, seed)
    groups = (tuple(name.encode("unicode_escape").decode() for name in named or options),)
    words = [*_NAMES, *options, repr(options)[:1_000], *(["weak_type"] if jax_value else [])]
    given = " ".join(words).encode(errors="replace")
    promised = (*PROMISED, TypeError, MemoryError)
    return Case(f"options/{_BASE}/{kind}", act, groups, promised=promised, given=given, seconds=_SECONDS)


def _generate(work: Path, options: dict[str, Any], is_right: bool, jax_value: bool, seed: int | None) -> None:
    lm = model_with_tokenizer(work)
    if jax_value:
        options = {name: jnp.asarray(*value) if value in _JAX_ODD else value for name, value in options.items()}
    try:
        result = decodax.generate(lm, list(_PROMPTS), **options)
    except Exception as error:
        if is_right:
            raise WrongResult(f"refused {options}: {type(error).__name__}: {str(error)[:300]}") from error
        raise
    try:
        metamorphic.check_generation(lm, result, list(_PROMPTS), options)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # an odd value that was accepted as another
        raise WrongResult(f"taken, and what does it mean? {options!r:.200}: {error}") from error
    if seed is not None:
        metamorphic.check_logprobs(lm, _PROMPTS, result, [seed % 3])
        metamorphic.check_rows_alone(lm, _PROMPTS, options, result, [seed % 3])
        if options.get("strategy") == "prompt_lookup" and not options.get("temperature"):
            plain = decodax.generate(lm, list(_PROMPTS), **{**options, "strategy": None})
            metamorphic.assert_same_on_all_processes(result, plain, "prompt_lookup and plain decoding")


def _prompts(work: Path, prompts: Any) -> None:
    lm = model_with_tokenizer(work)
    result = decodax.generate(lm, prompts, max_new_tokens=2)
    metamorphic.check_generation(lm, result, prompts, {"max_new_tokens": 2})
