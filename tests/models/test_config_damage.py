"""Damaged configs of every family are read, or refused in lines that name the field of the file."""

import json
import math
import random
import re
import warnings
from pathlib import Path

import pytest

from decodax.models.config import ModelConfig
from decodax.models.configs.hf_config import read_config
from decodax.models.families import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"
DROPPED = "dropped"
DAMAGES = [
    *(DROPPED, None, True, False, -1, 0, 1, 2, 3, 4, 7, 4097, 2**31, 10**9, 10**12, 10**400, -(10**400)),
    *(32.0, 0.5, -0.5, 1e-400, 1e-30, 1e31, math.inf, -math.inf, math.nan),
    *("", "3", "silu", "x\x1b[2J" * 10**5, [], [1], ["full_attention"], [None] * 10**4, [[]], {}, {"a": {"b": 1}}),
]
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.0,
    },
    "default": {"rope_theta": 100.0, "partial_rotary_factor": 1.0},
}
# Argument names of model classes, which are not in a config.json.
INNER = re.compile(
    r"\b(num_heads|num_kv_heads|head_size|rotary_size|experts_per_token|num_groups|num_groups_kept|nope_size|value_size"
    r"|latent_rank|query_rank|num_key_heads|num_value_heads|key_size|convolution_width|softcap|window|NoneType)\b"
)


def config_of(model_type):
    """The golden config of a family, with every field it reads."""
    files = (json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/config.json")))
    config = next(config for config in files if config["model_type"] == model_type)
    family = FAMILIES[model_type]
    named = {family.aliases.get(name, name) for name in config}
    return {name: value for name, value in family.defaults.items() if value is not None and name not in named} | config


def outcome(raw):
    """None for a config that is read, or the message that refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(read_config(raw)[1], ModelConfig)
        except ValueError as error:
            return str(error)
    return None


def check_message(message, names, fields=()):
    """Lines of a sane length without control characters; the first problem, or each, names the file's fields."""
    lines = [line.removeprefix("  - ") for line in message.removeprefix("this config cannot be used:").splitlines()]
    problems = [line for line in lines if line.strip()]
    assert len(problems) < 25 and all(len(line) < 500 and line.isprintable() for line in problems), message[:1000]
    assert any(name in message for name in names), (names, message[:500])
    assert not {*INNER.findall(message)} - {*fields}, message[:500]


def damaged(raw, name, value):
    return {key: item for key, item in raw.items() if key != name} | ({} if value is DROPPED else {name: value})


def damages_of(raw, names, generator, count):
    """Pairs of a field and a config in which it is damaged: in all ways, or in `count` that are drawn."""
    for name in names:
        for value in DAMAGES if count is None else generator.sample(DAMAGES, count):
            yield name, damaged(raw, name, value)


def check_fields(model_type, count):
    family, raw = FAMILIES[model_type], config_of(model_type)
    assert outcome(raw) is None
    names = [*family.defaults, *family.aliases, *family.fixed, "model_type", "rope_scaling", "rope_parameters"]
    names += ["layer_types", "quantization_config", "auto_map", "original_max_position_embeddings", "is_causal"]
    messages = []
    for name, damaged_config in damages_of(raw, names, random.Random(model_type), count):
        message = outcome(damaged_config)
        if message is not None:
            messages.append(message)
            check_message(message, [name], family.defaults)
    assert len(messages) > len(names) * (count or len(DAMAGES)) // 3  # most damages cannot be read


def check_rope_keys(kind, source, type_name, count):
    raw = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    settings = {type_name: kind, **ROPES[kind]}
    assert outcome({**raw, source: settings}) is None
    for name, damaged_config in damages_of(settings, settings, random.Random(kind), count):
        message = outcome({**raw, source: damaged_config})
        if message is not None:  # another type reads other keys
            check_message(message, [f"{source}." if name == type_name else f"{source}.{name}"])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_damaged(model_type):
    check_fields(model_type, 1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_damaged_in_every_way(model_type):
    check_fields(model_type, None)


@pytest.mark.parametrize("kind", ROPES)
def test_keys_of_the_rope_dictionary_damaged(kind):
    check_rope_keys(kind, "rope_scaling", "type", 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
def test_every_key_of_the_rope_dictionary_damaged_in_every_way(kind):
    check_rope_keys(kind, "rope_scaling", "type", None)
    check_rope_keys(kind, "rope_parameters", "rope_type", None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_several_fields_damaged_at_once(model_type):
    generator, raw = random.Random(model_type), config_of(model_type)
    for _ in range(100):
        names = generator.sample(list(FAMILIES[model_type].defaults), 3)
        damaged_config = raw
        for name in names:
            damaged_config = damaged(damaged_config, name, generator.choice(DAMAGES))
        message = outcome(damaged_config)
        if message is not None:
            check_message(message, names, FAMILIES[model_type].defaults)
