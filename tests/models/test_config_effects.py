"""Every field of every family has the effect it has in transformers: published configs, and single values.

The golden values are of scripts/make_golden_configs.py. Differences of decodax are listed, with the reason.
"""

import itertools
import json
import math
import warnings
from functools import cache
from pathlib import Path

import pytest

from decodax.models.configs.hf_config import read_config
from decodax.models.configs.known_fields import CHANGES_ELSEWHERE, CHECKED_TRANSFORMERS, WITHOUT_INFLUENCE
from decodax.models.configs.rope import ROPE_FIELDS
from decodax.models.families import FAMILIES
from tests.config_facts import facts_of

GOLDEN = Path(__file__).parent.parent / "golden" / "configs"
ABSENT = "absent"


@cache
def golden(name):
    content = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert content.pop("transformers") == CHECKED_TRANSFORMERS
    return content


def read(raw):
    """Our facts, or the message that refuses the config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignored fields, and contexts: tested in test_hf_config.py
        try:
            config = read_config(raw)[1]
        except ValueError as error:
            return str(error)
    family = FAMILIES[raw["model_type"]]
    context = raw.get("max_position_embeddings", family.defaults["max_position_embeddings"])
    facts = facts_of(config, context)
    # YaRN's context is the product of the factor and the original length, where that is larger.
    return {**facts, "context": context, "layers": run_lengths(facts["layers"])}


def run_lengths(items):
    return [[len(list(run)), item] for item, run in itertools.groupby(items)]


def flat(value, path=""):
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{path}/{name}").items()}


def differences(ours, theirs):
    """Paths at which two sets of facts differ; frequencies are rounded to four digits."""
    names = ours.keys() | theirs.keys()
    return {name: (ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in names if not same(ours, theirs, name)}


def same(ours, theirs, name):
    mine, other = ours.get(name, ABSENT), theirs.get(name, ABSENT)
    if isinstance(mine, float) and isinstance(other, int | float):
        return math.isclose(mine, other, rel_tol=2e-4)
    return mine == other and isinstance(mine, bool) == isinstance(other, bool)


@cache
def published(name):
    """Our facts of a published config."""
    return read(golden("published")[name]["config"])


PUBLISHED = [name for name, item in golden("published").items() if "config" in item]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    assert not differences(flat(published(name)), flat(golden("published")[name]["facts"]))


def test_many_published_configs_are_read():
    """Four of them name a weight format: bitsandbytes, or MLX."""
    packed = [name for name in PUBLISHED if golden("published")[name]["config"].get("quantization_config")]
    assert (len(PUBLISHED), len(packed)) == (55, 4)


def test_published_configs_of_other_families_are_refused_in_one_line():
    others = {item["model_type"] for item in golden("published").values() if "config" not in item}
    assert len(others) > 25
    for model_type in others:
        message = read({"model_type": model_type})
        assert message.startswith("model_type must be one of") and model_type in message and "\n" not in message


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_reads_the_fields_that_its_class_reads(model_type):
    family, found = FAMILIES[model_type], golden("fields")[model_type]
    theirs = {*found["declared"], *found["read"]}
    assert not {name for name in family.defaults if name not in theirs | ROPE_FIELDS}
    pairs = {frozenset(pair) for pair in found["aliases"].items() if {*pair} & family.defaults.keys()}
    assert pairs == {frozenset(pair) for pair in family.aliases.items()}
    read_here = {*family.defaults, *family.aliases, *family.ignored, *family.fixed, *ROPE_FIELDS, *WITHOUT_INFLUENCE}
    assert not set(found["declared"]) - read_here - CHANGES_ELSEWHERE.keys()


# Fields that decodax refuses with some value that transformers' class lets pass.
STRICTER = {
    "rope_scaling": "must be an object; the classes take false and an empty list for null",
    "is_causal": "no model here looks ahead",
    "sliding_window": "where the class does not read it, transformers' cache and vLLM do",
    "partial_rotary_factor": "where the class does not read it, other programs do; transformers fails or ignores it",
    "num_experts": "another name of a field that is given, too: transformers takes this one, whatever the other says",
    "num_local_experts": "the same",
    "rope_theta": "transformers checks no type, and frequencies that do not fall are no rotary embedding",
    "original_max_position_embeddings": "transformers checks no type, and reads it with some rope types only",
    "full_attention_interval": "transformers checks no type",
    "head_dim": "an odd number of coordinates, or no number",
    "linear_conv_kernel_dim": "a convolution over one token is none",
}
# Fields that decodax reads with some value that transformers refuses, or fails with.
MORE_LENIENT = {
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor", "clip_qkv", "query_pre_attn_scalar"), "any number"),
    **dict.fromkeys(
        ("attn_logit_softcapping", "final_logit_softcapping", "swiglu_alpha", "swiglu_limit"), "any number"
    ),
    "head_dim": "null derives it in every family; the class of DeepSeek-V2 overwrites it",
    "num_key_value_heads": "null derives it in every family; latent attention has none",
    **dict.fromkeys(("num_experts", "num_local_experts", "original_max_position_embeddings"), "null is absent"),
    **dict.fromkeys(("norm_topk_prob", "hidden_act", "num_mtp_layers"), "the class has it, and no code reads it"),
    "sliding_window": "not read with use_sliding_window false",
    **dict.fromkeys(("hidden_size", "num_attention_heads"), "they need not divide where head_dim is given"),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim"), "PyTorch cannot take pairs at odd offsets for complex"),
}


def effects(model_type, chosen):
    """Field, value, our facts (or message), and theirs (or None where they refuse), for the chosen golden values."""
    found = golden("effects")[model_type]
    plain = flat(found["facts"])
    for name, numbers in found["fields"].items():
        for value, number in zip(golden("effects")["values"], numbers, strict=True):
            if not chosen(value):
                continue
            raw = {key: item for key, item in found["base"].items() if key != name}
            ours = read(raw if value == ABSENT else {**raw, name: value})
            change = {} if number == -1 else {**plain, **found["changes"][number]}
            theirs = {key: leaf for key, leaf in change.items() if leaf != ABSENT}
            yield name, value, ours, theirs or None


def check_effects(model_type, chosen):
    """The same facts, or a difference that is listed."""
    num_equal, stricter, lenient, wrong = 0, [], [], []
    for name, value, ours, theirs in effects(model_type, chosen):
        if isinstance(ours, str):
            is_listed = name in STRICTER or (value == 0 and not isinstance(value, bool))  # no size may be 0
            if theirs is not None and not is_listed:
                stricter.append((name, value, ours))
        elif theirs is None:
            if name not in MORE_LENIENT:
                lenient.append((name, value))
        else:
            if ours["rope"] is None:  # no layer that rotates is left
                theirs = {key: leaf for key, leaf in theirs.items() if not key.startswith("/rope")} | {"/rope": None}
            found = differences(flat(ours), theirs)
            wrong += [(name, value, found)] if found else []
            num_equal += not found
    assert (stricter, lenient, wrong) == ([], [], [])
    return num_equal


def is_absent(value):
    return value in (ABSENT, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_absent_or_null(model_type):
    assert check_effects(model_type, is_absent) > 10


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_of_fields(model_type):
    """True, false, small numbers and other types."""
    assert check_effects(model_type, lambda value: not is_absent(value)) > 40
