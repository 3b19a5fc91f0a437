"""Every field of every family has the effect it has in transformers: published configs, and single values.

The golden values are of scripts/make_golden_configs.py. Differences of decodax are listed, with the reason.
"""

import json
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.rope import Rope
from decodax.models.checkpoints.name_prefix import TensorNames
from decodax.models.checkpoints.reading import StoredWeights, flat_weights, read_params
from decodax.models.checkpoints.write_hf import tensors_of
from decodax.models.configs.hf_config import read_config
from decodax.models.configs.known_fields import CHANGES_ELSEWHERE, CHECKED_TRANSFORMERS, WITHOUT_INFLUENCE
from decodax.models.configs.rope import ROPE_FIELDS
from decodax.models.families import FAMILIES
from decodax.models.model import Model
from tests.drawn_weights import PROBED, TOKENS, checksum, drawn
from tests.golden_headers import unpacked

GOLDEN = Path(__file__).parent.parent / "golden" / "configs"
ABSENT = "absent"
TOLERANCE = 2e-3  # of the largest logit: golden ones have five digits, and differ by far more where a field matters


@cache
def golden(name):
    content = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert content.pop("transformers") == CHECKED_TRANSFORMERS
    return content


def read(raw):
    """The family and its config, or the message that refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignored fields, and contexts: tested in test_hf_config.py
        try:
            return read_config(raw)
        except ValueError as error:
            return str(error)


def without_files(weights, filled):
    return StoredWeights(Path(), weights, filled, {}, TensorNames())


def stored_tensors(family, config):
    """The tensors that a checkpoint of this model has, as Hugging Face's class saves it."""
    weights = flat_weights(config.weights())
    return tensors_of(without_files(weights, {}), family.name_maps(config), dict.fromkeys(weights, np.dtype("float32")))


@dataclass(frozen=True)
class Drawn:
    """A stored tensor in memory."""

    label: str
    array: np.ndarray

    kind, mappings = "F32", ()

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def rows(self, index):
        return self.array.reshape(-1, self.array.shape[-1] if self.array.ndim else 1)[index]


@lru_cache(maxsize=64)
def logits(model_type, config):
    """Some logits of the model with drawn weights, as scripts/make_golden_configs.py has them of transformers."""
    family, filled = FAMILIES[model_type], {}
    for tensor in stored_tensors(family, config):
        stored = Drawn(tensor.name, drawn(tensor.name, tensor.shape))
        for path, tensor_slice in tensor.slices:
            filled.setdefault(path, []).append((tensor_slice, stored))
    weights = flat_weights(config.weights())
    opened = without_files({path: weights[path] for path in filled}, filled)
    params, model = read_params(opened, dtype=jnp.dtype("float32")), Model(config)
    tokens = jnp.asarray(TOKENS, jnp.int32)[None] % config.vocab_size
    position = jnp.arange(len(TOKENS), dtype=jnp.int32)[None]
    run = jax.jit(lambda params: model.logits(params, model.apply(params, tokens, position).hidden)[0])
    return np.asarray(run(params))[PROBED, :8].ravel()


def are_same(ours, theirs):
    theirs = np.asarray(theirs)
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


PUBLISHED = [name for name, item in golden("published").items() if "tensors" in item]


def rope_facts(rope, context):
    """As scripts/_golden_headers.py reads them of transformers."""
    if rope.scaling is None:
        facts = frequency_facts(rope.plain_frequencies().tolist())
        return {"short": facts, "long": facts, "magnitude": 1.0}
    facts = {}
    for name, length in (("short", 2), ("long", 2 * context)):
        found = np.asarray(rope.scaling.frequencies(rope, jnp.full((1, 1), length, jnp.int32)), np.float64)
        facts[name] = frequency_facts(found.reshape(-1).tolist())
    return {**facts, "magnitude": rope.scaling.attention_factor}


def frequency_facts(frequencies):
    count = len(frequencies)
    chosen = [frequencies[index] for index in (0, min(1, count - 1), count // 2, count - 1)]
    return [count, *chosen, sum(frequencies)]


def ropes_of(config):
    """The different rotations of a model's layers."""
    mixers = [block.mixer.layer for block in config.blocks]
    found = [getattr(mixer, "rope", getattr(mixer, "positions", None)) for mixer in mixers]
    return list(dict.fromkeys(rope for rope in found if isinstance(rope, Rope)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """The tensors that transformers' class has, and its rotations."""
    item = golden("published")[name]
    found = read(item["config"])
    assert not isinstance(found, str), found
    family, config = found
    ours = {tensor.name: tuple(tensor.shape) for tensor in stored_tensors(family, config)}
    assert ours == unpacked(item["tensors"])
    context = item["config"].get("max_position_embeddings", family.defaults["max_position_embeddings"])
    ours = [rope_facts(rope, context) for rope in ropes_of(config)]
    theirs = list((item["rope"] or {}).values())
    for rope in ours:
        assert any(all(np.allclose(rope[key], other[key], rtol=2e-4) for key in other) for other in theirs)
    assert bool(ours) == bool(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_in_small(name):
    item = golden("published")[name]
    found = read(item["config"] | item["small"])
    assert not isinstance(found, str), found
    assert item["logits"] is not None and are_same(logits(found[0].model_type, found[1]), item["logits"])


def test_published_configs_of_other_families_are_refused_in_one_line():
    others = {item["model_type"] for item in golden("published").values() if "config" not in item}
    assert len(others) > 5
    for model_type in others:
        message = read({"model_type": model_type})
        assert message.startswith("model_type must be one of") and model_type in message and "\n" not in message


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_reads_the_fields_that_its_class_reads(model_type):
    family, found = FAMILIES[model_type], golden("fields")[model_type]
    theirs = {*found["declared"], *found["read"], *found["aliases"]}
    in_rope = {*ROPE_FIELDS, "partial_rotary_factor"}  # read by the code that all families share
    # A class of ALiBi has no context; the files have that of the training, by a name that the class does not read.
    in_rope |= {"max_position_embeddings"} if model_type == "bloom" else set()
    assert not {name for name in family.defaults if name not in theirs | in_rope}
    pairs = {frozenset(pair) for pair in found["aliases"].items() if {*pair} & family.defaults.keys()}
    from_code = {name for name in family.aliases if name in {*found["read"], "seq_length"}}  # not by attribute_map
    ours = {frozenset(pair) for pair in family.aliases.items() if pair[0] not in from_code}
    assert pairs - {frozenset((name, family.aliases[name])) for name in from_code} == ours
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
    **dict.fromkeys(("hidden_size", "n_embd"), "heads that do not divide the width, where no head_dim is given"),
    **dict.fromkeys(("num_attention_heads", "n_head"), "the same"),
    "hidden_size_per_layer_input": "Gemma 4's embeddings per layer are not implemented",
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_L_cache"), "a convolution over one token is none"),
    "attn_logit_softcapping": "Gemma 3's class has it, and no code reads it",
    **dict.fromkeys(("use_double_wide_mlp", "enable_moe_block", "num_kv_shared_layers"), "not implemented"),
    **dict.fromkeys(("rope_local_base_freq", "sliding_window_pattern"), "transformers checks no type"),
    **dict.fromkeys(("global_head_dim", "rotary_dim"), "an odd number of coordinates, or no number"),
    **dict.fromkeys(("max_position_embeddings", "num_hidden_layers"), "too few, or beside another name of the field"),
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
    **dict.fromkeys(("max_position_embeddings", "num_hidden_layers"), "null beside another name of the field"),
    **dict.fromkeys(("rope_scaling", "rope_theta"), "null is absent; Gemma 4's class fails with it"),
    "logit_scale": "any number",
    "sliding_window_pattern": "0 is none, as in EXAONE 4's files without windows",
    "block_ffn_dim_multiplier": "null is 1; the code reads it so, and the class refuses it",
    **dict.fromkeys(("norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon"), "any number"),
    **dict.fromkeys(("n_shared_experts", "shared_expert_intermediate_size"), "0 is none; the classes fail"),
    **dict.fromkeys(("moe_intermediate_size", "top_k_experts"), "of experts, which Gemma 4 has in one size alone"),
    "vocab_size": "OPT's class wants room for the token that pads",
}


# Fields that mean something else here than in transformers.
DEPARTURES = {
    ("gpt_neox", "head_dim"): "the class reads it for the rotation alone, which then does not fit the heads",
    ("minimax_m2", "partial_rotary_factor"): "null is absent, and rotary_dim counts; the class takes it for 1",
    ("olmo3", "rope_theta"): "where it is beside the rope dictionary, it counts for all layers",
}


def effects(model_type, chosen):
    """Field, value, our family and config (or message), and the number of their logits, for the chosen values."""
    found = golden("effects")[model_type]
    for name, numbers in found["fields"].items():
        for value, number in zip(golden("effects")["values"], numbers, strict=True):
            if chosen(value):
                raw = {key: item for key, item in found["base"].items() if key != name}
                yield name, value, read(raw if value == ABSENT else {**raw, name: value}), number


@lru_cache(maxsize=256)
def shapes(model_type, config):
    """A checksum of the tensors of a checkpoint."""
    return checksum({tensor.name: tuple(tensor.shape) for tensor in stored_tensors(FAMILIES[model_type], config)})


def check_effects(model_type, chosen, *, runs):
    """The same tensors and logits, or a difference that is listed.

    Only configs with the tensors of the base are run, and without `runs` none.
    """
    found, num_equal, stricter, lenient, wrong = golden("effects")[model_type], 0, [], [], []
    base, outcomes = read(found["base"])[1], found["outcomes"]
    for name, value, ours, number in effects(model_type, chosen):
        if isinstance(ours, str):
            is_listed = name in STRICTER or (value == 0 and not isinstance(value, bool))  # no size may be 0
            if number != -1 and not is_listed:
                stricter.append((name, value, ours))
            continue
        if number == -1:
            if name not in MORE_LENIENT:
                lenient.append((name, value))
            continue
        config, theirs = ours[1], outcomes[number]
        equal = shapes(model_type, config) == theirs["shapes"]
        if equal and config == base:
            equal = number == 0
        elif equal and runs and theirs["shapes"] == outcomes[0]["shapes"]:
            equal = are_same(logits(model_type, config), theirs["logits"])
        num_equal += equal
        wrong += [] if equal or (model_type, name) in DEPARTURES else [(name, value)]
    assert (stricter, lenient, wrong) == ([], [], [])
    return num_equal


def is_absent(value):
    return value in (ABSENT, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_absent_or_null(model_type):
    assert check_effects(model_type, is_absent, runs=False) > 10


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_of_fields(model_type):
    """Absent, null, true, false, small numbers and other types."""
    assert check_effects(model_type, lambda value: True, runs=True) > 40
