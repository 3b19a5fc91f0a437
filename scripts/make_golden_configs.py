"""Writes tests/golden/configs/: what transformers makes of published configs, and of every field of a config.

    pip install "transformers>=5" torch
    python -m decodax.scripts.make_golden_configs PUBLISHED [FAMILY ...]

PUBLISHED is a folder of folders with a published `config.json` each; with families, only theirs are made again. Four
files are written:

    defaults.json   per family: the fields of its class made without arguments
    fields.json     per family: the fields that its class has or that its code reads, and their other names
    published.json  per published config of a known family: its fields with an influence; the names and shapes of the
                    tensors of the model that transformers builds from them; how it rotates; the same config with small
                    sizes, and some logits of that model, or that transformers refuses it; of other configs the
                    model_type
    effects.json    per family, field that it reads and value: the number of the outcome of a tiny model with this
                    value in its config (tensors, logits), or -1 where transformers refuses it or its forward fails

The weights of the models are drawn by tensor name (tests/drawn_weights.py), so that decodax can draw the same.
"""

import dataclasses
import importlib
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decodax.models.checkpoints.name_map_selection import REDUNDANT_SUFFIXES
from decodax.models.configs.known_fields import WITHOUT_INFLUENCE
from decodax.models.families import FAMILIES
from decodax.scripts._golden_cases import CASES, implementations
from decodax.scripts._golden_headers import packed_header, rope_facts, shrunk
from tests.drawn_weights import PROBED, TOKENS, checksum, drawn

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "configs"
ABSENT = "absent"  # in place of a value: the field is left out
VALUES = [ABSENT, None, True, False, 0, 1, 2, 3, 0.5, "gelu", [], {}]
# Read by the code that all families share in transformers: PreTrainedConfig (the rotation), masks and caches.
OF_ALL = [
    *("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"),
    *("is_causal", "sliding_window", "use_sliding_window", "layer_types"),
]
_READ = re.compile(r"config\.([a-z]\w*)|attr\((?:self\.)?config, \"(\w+)\"|kwargs\.\w+\(\"(\w+)\"")


def base_of(model_type: str) -> dict[str, Any]:
    """A tiny config of the family."""
    return next(config for config in CASES.values() if config["model_type"] == model_type)


def classes_of(model_type: str) -> tuple[Any, Any, Any]:
    """The family's config class, and the modules of its configuration and its model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    folder = config.__module__.rpartition(".")[0]
    name = folder.rpartition(".")[2]
    return config, *(importlib.import_module(f"{folder}.{kind}_{name}") for kind in ("configuration", "modeling"))


def fields_of(model_type: str) -> dict[str, Any]:
    """The fields that the class declares, those that its files read, and other names for fields."""
    config, *modules = classes_of(model_type)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    read = {name for source in sources for found in _READ.findall(source) for name in found if name}
    declared = {field.name for field in dataclasses.fields(config)}
    aliases = dict(config.attribute_map)
    return {"declared": sorted(declared), "read": sorted((read & declared) | (read - declared)), "aliases": aliases}


def default_of(model_type: str) -> dict[str, Any]:
    """The fields that decodax reads of the class made without arguments, as `save_pretrained` writes them."""
    family, written = FAMILIES[model_type], classes_of(model_type)[0]().to_dict()
    read = {*family.defaults, *family.aliases, "rope_parameters", "model_type"}
    return {name: value for name, value in written.items() if name in read}


def config_of(raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(json.dumps(raw)))


def model_on(device: str, config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def saved_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint as transformers saves it, without those that are tied, or follow from the config."""
    from transformers.core_model_loading import revert_weight_conversion

    model = model_on("meta", config)
    tied = {} if not config.tie_word_embeddings else model._tied_weights_keys or {}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors = revert_weight_conversion(model, own)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(REDUNDANT_SUFFIXES)}


def outcome_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Some logits of the model with drawn weights, and a checksum of its tensors' names and shapes.

    None where transformers refuses the config or fails.
    """
    import torch

    try:
        config = config_of(raw)
        shapes = saved_shapes(config)
        tensors = {name: torch.tensor(drawn(name, shape)) for name, shape in shapes.items()}
        kind = type(model_on("meta", config))
        model = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, **implementations(raw)
        ).eval()
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS)[None] % config.vocab_size, use_cache=False).logits[0]
        picked = [float(f"{number:.5g}") for number in logits[PROBED, : min(8, logits.shape[1])].flatten().tolist()]
        return {"shapes": checksum(shapes), "logits": picked} if all(map(_is_finite, picked)) else None
    except Exception:  # any: the classes check little, and the code fails in its own ways
        return None


def _is_finite(number: float) -> bool:
    return abs(number) < 1e30


def effects_of(model_type: str, names: list[str]) -> dict[str, Any]:
    """The outcomes of the tiny model and of its variants, and per field the number of the outcome of each value."""
    base = base_of(model_type)
    plain = outcome_of(base)
    assert plain is not None, model_type
    outputs, fields = [plain], {}
    for name in names:
        numbers = []
        for value in VALUES:
            raw = {key: item for key, item in base.items() if key != name}
            found = outcome_of(raw if value == ABSENT else {**raw, name: value})
            if found is not None and found not in outputs:
                outputs.append(found)
            numbers.append(-1 if found is None else outputs.index(found))
        fields[name] = numbers
    return {"base": base, "outcomes": outputs, "fields": fields}


def published_of(raw: dict[str, Any]) -> dict[str, Any]:
    """A published config: its fields with an influence, and what transformers makes of them."""
    if raw.get("model_type") not in FAMILIES:
        return {"model_type": raw.get("model_type")}
    kept = {
        name: value
        for name, value in raw.items()
        if name not in WITHOUT_INFLUENCE - {"model_type", "transformers_version"}
    }
    plain = {name: value for name, value in kept.items() if name not in ("auto_map", "quantization_config")}
    small = shrunk(plain)
    try:
        config = config_of(plain)
        found = {"tensors": packed_header(saved_shapes(config)), "rope": rope_facts(config, model_on("meta", config))}
    except Exception as error:
        return {"config": kept, "refused": type(error).__name__}
    outcome = outcome_of({**plain, **small})
    return {"config": kept, **found, "small": small, "logits": None if outcome is None else outcome["logits"]}


def write(name: str, content: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    (FOLDER / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{name}: {(FOLDER / name).stat().st_size / 1e3:.0f} kB", flush=True)


def kept(name: str, families: list[str]) -> dict[str, Any]:
    """What a file holds of other families than these."""
    path = FOLDER / name
    if not families or not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    version, chosen = {"transformers": transformers.__version__}, sys.argv[2:]
    new = chosen or list(FAMILIES)
    fields = kept("fields.json", chosen) | {model_type: fields_of(model_type) for model_type in new}
    write("fields.json", version | {name: fields[name] for name in FAMILIES})
    defaults = kept("defaults.json", chosen) | {model_type: default_of(model_type) for model_type in new}
    write("defaults.json", version | {name: defaults[name] for name in FAMILIES})
    published = kept("published.json", chosen)
    for path in sorted(Path(sys.argv[1]).glob("*/config.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not chosen or raw.get("model_type") in chosen:
            published[path.parent.name] = published_of(raw)
    write("published.json", version | {name: published[name] for name in sorted(published) if name != "transformers"})
    everywhere = {name for family in FAMILIES.values() for name in family.defaults}
    effects = kept("effects.json", chosen)
    for model_type in new:
        found = fields[model_type]
        meaning = (everywhere & {*found["declared"], *found["read"]}) | {*found["aliases"], *OF_ALL}
        effects[model_type] = effects_of(model_type, sorted(meaning))
        print(model_type, len(effects[model_type]["outcomes"]), flush=True)
    write("effects.json", version | {"values": VALUES} | {name: effects[name] for name in FAMILIES})


if __name__ == "__main__":
    main()
