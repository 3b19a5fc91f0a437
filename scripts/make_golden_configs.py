"""Writes tests/golden/configs/: the facts that transformers derives from published configs and from every field.

    pip install "transformers>=5" torch
    python -m decodax.scripts.make_golden_configs PUBLISHED

PUBLISHED is a folder of folders with a published `config.json` each. Three files are written:

    fields.json     per family: the fields that its class has or that its code reads, and their other names
    published.json  per published config of a known family: its fields with an influence, and the facts of the model
                    that transformers builds from them (scripts/_config_facts.py), or that it refuses; of other
                    configs the model_type
    effects.json    per family, field that it reads and value: what changes in the facts of a tiny model with this value
                    in its config, or -1 where transformers refuses it or its forward fails
"""

import dataclasses
import importlib
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from decodax.models.configs.known_fields import WITHOUT_INFLUENCE
from decodax.models.families import FAMILIES
from decodax.scripts._config_facts import facts_of, windows_by_mask, windows_by_rule
from decodax.scripts._golden_cases import CASES

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "configs"
ABSENT = "absent"  # in place of a value: the field is left out
VALUES = [ABSENT, None, True, False, 0, 1, 2, 3, 0.5, "gelu", [], {}]
# Read by the code that all families share in transformers: PreTrainedConfig (the rotation), masks and caches.
OF_ALL = [
    *("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"),
    *("is_causal", "sliding_window", "use_sliding_window", "layer_types"),
]
NUM_TOKENS = 24
_READ = re.compile(r"config\.([a-z]\w*)|attr\((?:self\.)?config, \"(\w+)\"|kwargs\.\w+\(\"(\w+)\"")


def base_of(model_type: str) -> dict[str, Any]:
    """A tiny config of the family."""
    return next(config for config in CASES.values() if config["model_type"] == model_type)


def classes_of(model_type: str) -> tuple[Any, Any, Any]:
    """The family's config class, and the modules of its configuration and its model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    modules = (f"transformers.models.{model_type}.{kind}_{model_type}" for kind in ("configuration", "modeling"))
    return config, *(importlib.import_module(name) for name in modules)


def fields_of(model_type: str) -> dict[str, Any]:
    """The fields that the class declares, those that its files read, and other names for fields."""
    config, *modules = classes_of(model_type)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    read = {name for source in sources for found in _READ.findall(source) for name in found if name}
    declared = {field.name for field in dataclasses.fields(config)}
    aliases = dict(config.attribute_map)
    return {"declared": sorted(declared), "read": sorted((read & declared) | (read - declared)), "aliases": aliases}


def model_of(raw: dict[str, Any], device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    with torch.device(device):
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager).eval()


def windows_of(model: Any) -> list[int | None]:
    """Each layer's window as counted in its mask; by the rule where it is wider than the mask."""
    seen, by_rule = windows_by_mask(model, NUM_TOKENS), windows_by_rule(model)
    return [
        rule if mask is None and rule is not None and rule >= NUM_TOKENS else mask
        for mask, rule in zip(seen, by_rule, strict=True)
    ]


def tiny_facts(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of a tiny model, after a forward; None where transformers refuses or fails."""
    try:
        model = model_of(raw, "cpu")
        facts = facts_of(model, windows_of(model))
        return {**facts, "layers": run_lengths(facts["layers"])}
    except Exception:  # any: the classes check little, and the code fails in its own ways
        return None


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one: path -> value."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{path}/{name}").items()}


def effects_of(model_type: str, names: list[str]) -> dict[str, Any]:
    """The facts of the tiny model, all the changes to them, and per field the number of the change of each value."""
    base = base_of(model_type)
    facts = tiny_facts(base)
    assert facts is not None
    plain, changes, fields = flat(facts), [{}], {}
    for name in names:
        numbers = []
        for value in VALUES:
            raw = {key: item for key, item in base.items() if key != name}
            found = tiny_facts(raw if value == ABSENT else {**raw, name: value})
            if found is None:
                numbers.append(-1)
                continue
            leaves = flat(found)
            change = {path: leaf for path, leaf in leaves.items() if plain.get(path, ABSENT) != leaf}
            change |= {path: ABSENT for path in plain.keys() - leaves.keys()}
            if change not in changes:
                changes.append(change)
            numbers.append(changes.index(change))
        fields[name] = numbers
    return {"base": base, "facts": facts, "changes": changes, "fields": fields}


def published_of(raw: dict[str, Any]) -> dict[str, Any]:
    """A published config: its fields with an influence, and the facts."""
    if raw.get("model_type") not in FAMILIES:
        return {"model_type": raw.get("model_type")}
    kept = {
        name: value
        for name, value in raw.items()
        if name not in WITHOUT_INFLUENCE - {"model_type", "transformers_version"}
    }
    plain = {name: value for name, value in kept.items() if name not in ("auto_map", "quantization_config")}
    try:
        model = model_of(plain, "meta")
        facts = facts_of(model, windows_by_rule(model))
    except Exception as error:
        return {"config": kept, "facts": None, "refused": type(error).__name__}
    facts["layers"] = run_lengths(facts["layers"])
    return {"config": kept, "facts": facts}


def run_lengths(items: list[Any]) -> list[list[Any]]:
    """[[how many, what], ...] of neighbours that are equal."""
    return [[len(list(run)), item] for item, run in itertools.groupby(items)]


def write(name: str, content: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    (FOLDER / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{name}: {(FOLDER / name).stat().st_size / 1e3:.0f} kB")


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    version = {"transformers": transformers.__version__}
    fields = {model_type: fields_of(model_type) for model_type in FAMILIES}
    write("fields.json", version | fields)
    paths = sorted(Path(sys.argv[1]).glob("*/config.json"))
    published = {path.parent.name: published_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths}
    write("published.json", version | published)
    everywhere = {name for family in FAMILIES.values() for name in family.defaults}
    effects: dict[str, Any] = {}
    for model_type, found in fields.items():
        meaning = (everywhere & {*found["declared"], *found["read"]}) | {*found["aliases"], *OF_ALL}
        effects[model_type] = effects_of(model_type, sorted(meaning))
        print(model_type, len(effects[model_type]["changes"]), flush=True)
    write("effects.json", version | {"values": VALUES} | effects)


if __name__ == "__main__":
    main()
