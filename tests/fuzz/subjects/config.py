"""Damages config.json: each field of every family absent, null, of another type, negative or huge, and the file.

An absent or null field has the value that transformers' class gives it (`class_defaults.json`): such a folder must
load as one with that value, or be refused as that one is.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from decodax.models.load import load
from tests.fuzz.damage import Allowed, Damage, byte_damages, field_damages, text_damages
from tests.fuzz.folders import check_loads, config_of, copy_of, differences, golden_model, one_of_each_family
from tests.fuzz.verdict import Case, WrongResult
from tests.golden_files import golden_cases

_FILE = "config.json"
_RECORDED = json.loads((Path(__file__).parents[1] / "class_defaults.json").read_text(encoding="utf-8"))

# Numbers that scale what is computed, or bound a text: another one describes another model of the same weights.
_FREE_NUMBERS = frozenset(
    [
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "sliding_window",
        "max_window_layers",
        "num_experts_per_tok",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "clip_qkv",
        "routed_scaling_factor",
        "swiglu_alpha",
        "swiglu_limit",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
        "full_attn_alpha_factor",
        "full_attn_beta_factor",
        "linear_attn_alpha_factor",
        "linear_attn_beta_factor",
        "mlp_alpha_factor",
        "mlp_beta_factor",
        "original_max_position_embeddings",
        "block_size",
        "topk_group",
        "n_group",
        "num_attention_heads",
    ]
)
# Fields that together define the shapes of the weights: a message may name any of them for another one's damage.
_SIZES = tuple(
    [
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "moe_intermediate_size",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "n_shared_experts",
        "shared_expert_intermediate_size",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ]
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_type", "original_max_position_embeddings")


def cases(work: Path) -> Iterator[Case]:
    """All cases; the golden folders are copied into `work`."""
    seen: set[tuple[str, str, str]] = set()  # a field with the same value in two folders of a family is one
    bases = one_of_each_family()
    for base in bases + [name for name in golden_cases() if name not in bases]:
        config = config_of(base)
        for field, value in config.items():
            key = (config["model_type"], field, json.dumps(value))
            if key not in seen:
                seen.add(key)
                yield from _field_cases(work, base, field, value)
    yield from _added_fields(work, "llama")
    yield from _whole_file(work, "llama")


def _field_cases(work: Path, base: str, field: str, value: Any) -> Iterator[Case]:
    config = config_of(base)
    recorded = _RECORDED[base].get(field, {})
    for kind, changed in (
        ("absent", {key: config[key] for key in config if key != field}),
        ("null", config | {field: None}),
    ):
        if kind == "null" and value is None:
            continue
        name = f"config/{base}/{kind}:{field}"
        if recorded:  # null, where transformers refuses it, may mean that the field is absent
            means = recorded.get(kind, recorded.get("absent"))
            means = False if means is None and isinstance(value, bool) else means
            yield _case(name, field, partial(_like, work, base, changed, config | {field: means}), _text(config))
        else:
            yield _case(name, field, partial(_load, work, base, _text(changed), Allowed.SAME), _text(config))
    for damage in field_damages(value):
        if damage.kind == "null":
            continue
        is_number = damage.kind.startswith(("huge", "zero", "retype:fraction", "retype:number"))
        is_number = is_number and isinstance(value, int | float | None) and not isinstance(value, bool)
        is_other = field in _FREE_NUMBERS if is_number else field in _ROPE and damage.content == {}
        allowed = Allowed.OTHER if is_other else damage.allowed
        content = _text(config | {field: damage.content})
        name, act = f"config/{base}/{damage.kind}:{field}", partial(_load, work, base, content, allowed)
        yield _case(name, field, act, content)
    if isinstance(value, dict):
        yield from _nested_cases(work, base, field, value)


def _nested_cases(work: Path, base: str, field: str, value: dict[str, Any]) -> Iterator[Case]:
    """The same one level deeper: rope scalings, quantisation. Most of their numbers may be changed."""
    config = config_of(base)
    for inner, number in value.items():
        without = {key: value[key] for key in value if key != inner}
        changes = [
            Damage("absent", without),
            *(Damage(d.kind, value | {inner: d.content}) for d in field_damages(number)),
        ]
        for damage in changes:
            content = _text(config | {field: damage.content})
            act = partial(_load, work, base, content, Allowed.OTHER)
            yield Case(f"config/{base}/{damage.kind}:{field}.{inner}", act, ((_FILE,), (inner, field, *_ROPE)))


def _added_fields(work: Path, base: str) -> Iterator[Case]:
    """Fields unknown to any class: they change nothing, and messages print their names escaped."""
    for index, name in enumerate(("zzz_unknown", "", "a b", "\x1b[31mred", "é" * 300, "hidden_size ")):
        content = _text(config_of(base) | {name: 1})
        named = ((_FILE,),) if index else ((_FILE,), (name,))
        yield Case(
            f"config/{base}/unknown field:{index}",
            partial(_load, work, base, content, Allowed.SAME),
            named,
            given=content,
        )
    reordered = dict(sorted(config_of(base).items(), reverse=True))
    yield Case(f"config/{base}/reordered", partial(_load, work, base, _text(reordered), Allowed.HARMLESS))
    twice = _text(config_of(base)).rstrip()[:-1] + b', "hidden_size": 31}'
    yield Case(f"config/{base}/given twice", partial(_load, work, base, twice, Allowed.SAME), ((_FILE, "hidden_size"),))


def _whole_file(work: Path, base: str) -> Iterator[Case]:
    content = (copy_of(base, work) / _FILE).read_bytes()
    for damage in (*text_damages(content), *byte_damages(content, range(300))):
        # A changed byte may give another number, or another field.
        allowed = Allowed.OTHER if ":" in damage.kind else damage.allowed
        act = partial(_load, work, base, damage.content, allowed)
        yield Case(f"config/{base}/file:{damage.kind}", act, ((_FILE, "safetensors"),), given=damage.content)


def _case(name: str, field: str, act: Any, given: bytes) -> Case:
    words = (field, *(_SIZES if field in _SIZES else ()), *(_ROPE if field in _ROPE else ()))
    if field == "layer_types":
        # Tensor names do not show the kinds of layers in general: the layers' tensors are listed.
        words += ("num_hidden_layers", "sliding_window", "missing: model.layers.")
    return Case(name, act, ((_FILE,), words), given=given)


def _text(config: dict[str, Any]) -> bytes:
    return json.dumps(config).encode()


def _load(work: Path, base: str, content: bytes, allowed: Allowed) -> None:
    folder = copy_of(base, work)
    (folder / _FILE).write_bytes(content)
    check_loads(folder, golden_model(base), allowed)


def _like(work: Path, base: str, changed: dict[str, Any], explicit: dict[str, Any]) -> None:
    """The changed config means the same as the explicit one."""
    folder = copy_of(base, work)
    (folder / _FILE).write_bytes(_text(explicit))
    try:
        right = load(folder)
    except Exception:
        right = None  # judged where the explicit value is a case of its own
    (folder / _FILE).write_bytes(_text(changed))
    loaded = load(folder)
    if right is None:
        raise WrongResult("loaded, though what transformers' class makes of it is refused")
    if found := differences(loaded, right):
        raise WrongResult(f"loaded as another model than transformers makes of it ({'; '.join(found[:4])})")
