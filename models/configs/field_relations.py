"""Checks the relations between fields of a `config.json`: which sizes divide others, and which limits hold."""

from collections.abc import Callable, Mapping
from typing import Any

# Limits for all layers together: each expert and head costs memory before any weight is read. Published models have up
# to 25,000 experts and 16,000 heads in all.
MAX_EXPERTS_IN_ALL = 2**16
MAX_HEADS_IN_ALL = 2**20
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_relations(fields: Mapping[str, Any], name: Callable[[str], str], problems: list[str]) -> None:
    """Appends to `problems` what does not fit together.

    fields: each of the right kind.
    name: maps a field to its name in the file.
    """
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    if layers * heads > MAX_HEADS_IN_ALL:
        problems.append(
            f"num_hidden_layers x num_attention_heads must be at most {MAX_HEADS_IN_ALL:,}, got {layers} x {heads}"
        )
    _divides(fields, "num_attention_heads", "num_key_value_heads", problems)
    _divides(fields, "linear_num_value_heads", "linear_num_key_heads", problems)
    for count in _EXPERT_COUNTS:
        if fields.get(count) is not None:
            _check_experts(fields, name(count), fields[count], problems)


def _divides(fields: Mapping[str, Any], multiple: str, divisor: str, problems: list[str]) -> None:
    if multiple in fields and divisor in fields and fields[multiple] % fields[divisor]:
        problems.append(f"{multiple} must be a multiple of {divisor}, got {fields[multiple]} and {fields[divisor]}")


def _check_experts(fields: Mapping[str, Any], name: str, count: int, problems: list[str]) -> None:
    per_token = "top_k_experts" if "top_k_experts" in fields else "num_experts_per_tok"
    layers, chosen = fields["num_hidden_layers"], fields[per_token]
    if layers * count > MAX_EXPERTS_IN_ALL:
        problems.append(f"num_hidden_layers x {name} must be at most {MAX_EXPERTS_IN_ALL:,}, got {layers} x {count}")
    if chosen is not None and chosen > count:
        problems.append(f"{per_token} must be in 1..{count} ({name}), got {chosen}")
    if "n_group" in fields and fields.get("topk_method") != "greedy":
        _check_groups(fields, name, count, problems)


def _check_groups(fields: Mapping[str, Any], name: str, count: int, problems: list[str]) -> None:
    """Checks experts in equal groups, of which `topk_group` are kept."""
    groups, kept, chosen = fields["n_group"], fields["topk_group"], fields["num_experts_per_tok"]
    if groups is None or kept is None:
        if groups is not kept or "topk_method" in fields:
            problems.append(f"n_group and topk_group must both be given, got {groups} and {kept}")
    elif count % groups:
        problems.append(f"{name} must be a multiple of n_group, got {count} and {groups}")
    elif kept > groups:
        problems.append(f"topk_group must be in 1..{groups} (n_group), got {kept}")
    elif kept * (count // groups) < chosen:
        problems.append(
            f"the groups kept must hold at least num_experts_per_tok = {chosen} experts, got topk_group = {kept} of "
            f"n_group = {groups} with {count // groups} each"
        )
    elif count // groups < 2 and "topk_method" not in fields:  # a group's score is the sum of its two best
        problems.append(f"n_group must leave at least 2 experts in each group, got {groups} groups of {count} ({name})")
