"""Reads how a GGUF file scales the rotation of positions, as the `rope_scaling` of a config.json.

Llama 3's scaling is not stored by its four numbers but by what they give: a tensor with the factor that divides each
frequency. Where the numbers that all published files have give these factors, they are named; else the factors are
listed, as rope type "longrope" has them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from decodax.core.printable import printable

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192
_TOLERANCE = 1e-4  # llama.cpp's converter computes the factors from powers in float32
_SCALING = "rope.scaling."
_LENGTH = {"original_context_length": "original_max_position_embeddings"}
_RAMP = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_LOG_MULTIPLIER = f"{_SCALING}yarn_log_multiplier"
_ONE = (f"{_SCALING}attn_factor", f"{_SCALING}yarn_attn_factor", f"{_SCALING}yarn_ext_factor")
READ = frozenset(
    {
        *_ONE,
        *(f"{_SCALING}{name}" for name in ("type", "factor", "finetuned", *_LENGTH, *_RAMP)),
        "rope.scale_linear",
    }
)


def rope_scaling(
    keys: Mapping[str, Any],
    factors: np.ndarray | None,
    base: float,
    context: int,
    *,
    truncates: bool,
    scales_scores: bool,
    problems: list[str],
) -> dict[str, Any] | None:
    """The scaling, or None.

    keys: of the architecture, without its name.
    factors: what divides the frequency of each pair, if the file says.
    base: of the frequencies.
    context: in tokens.
    truncates: whether the bounds of YaRN's ramp are rounded to whole pairs.
    scales_scores: whether YaRN scales the scores in place of the rotation (DeepSeek's `mscale_all_dim`).
    problems: gets what is not understood.
    """
    for key in _ONE:
        if keys.get(key, 1.0) != 1:
            problems.append(f"{key} must be 1 or absent, got {printable(keys[key])}")
    kind = keys.get(f"{_SCALING}type", "linear")  # as llama.cpp takes it
    factor = keys.get(f"{_SCALING}factor", keys.get("rope.scale_linear", 0.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return None if factors is None else _by_factors(factors, base, context)
    if factors is not None:
        problems.append(f"{_SCALING}type must be none where a tensor has the factors, got {printable(kind)}")
        return None
    if kind not in ("linear", "yarn"):
        problems.append(f"{_SCALING}type must be none, linear or yarn, got {printable(kind)}")
        return None
    names = _LENGTH if kind == "linear" else _LENGTH | _RAMP
    scaling = {"rope_type": kind, "factor": factor}
    scaling |= {name: keys[f"{_SCALING}{key}"] for key, name in names.items() if f"{_SCALING}{key}" in keys}
    if kind == "yarn" and scales_scores:
        multiplier = keys.get(_LOG_MULTIPLIER)
        if not isinstance(multiplier, float) or multiplier <= 0:
            problems.append(f"{_LOG_MULTIPLIER} must be a number above 0 with yarn, got {printable(multiplier)}")
            return None
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * multiplier, 6))  # a tenth of it is stored
    return scaling | {"truncate": False} if kind == "yarn" and not truncates else scaling


def _by_factors(factors: np.ndarray, base: float, context: int) -> dict[str, Any] | None:
    """The scaling that divides the frequencies by these factors."""
    if (factors == 1).all():
        return None
    factor = float(factors[-1])
    if np.allclose(factors, _llama3(len(factors), base, factor), rtol=_TOLERANCE, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": _LLAMA3_LENGTH,
        }
    listed = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3(num_pairs: int, base: float, factor: float) -> np.ndarray:
    """The factors that Llama 3's scaling gives: 1 for short waves, `factor` for long ones, between them a blend."""
    frequency = base ** -(np.arange(num_pairs) / num_pairs)
    waves = _LLAMA3_LENGTH * frequency / (2 * math.pi)  # in the length that the model was trained with
    share = np.clip((waves - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    return 1 / ((1 - share) / factor + share)
