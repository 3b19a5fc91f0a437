"""Records the values transformers gives to absent and null fields of the golden configs: `class_defaults.json`.

    python -m tests.fuzz.record_class_defaults        (needs transformers; the tests only read what it wrote)

For each golden folder and field: "absent" is the value in transformers' class without the field, "null" the value for
null; a field is left out where transformers refuses the file.
"""

import copy
import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# The file's fields that transformers keeps under another name, or not at all.
_NOT_KEPT = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config"}


def _read(raw: dict[str, Any], field: str) -> Any:
    """The field's value as transformers reads the file; raises where it refuses."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))  # transformers writes into rope_scaling
    if field == "rope_theta":
        return config.rope_parameters["rope_theta"]
    if field == "partial_rotary_factor":
        return config.rope_parameters.get("partial_rotary_factor", 1.0)  # as the models read it
    if field in ("rope_scaling", "rope_parameters"):
        return {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    return getattr(config, field)


def record() -> dict[str, dict[str, dict[str, Any]]]:
    recorded: dict[str, dict[str, dict[str, Any]]] = {}
    for golden in sorted((_HERE.parent / "golden").glob("*/golden.npz")):
        file = golden.with_name("config.json")
        raw = json.loads(file.read_text())
        for field in sorted(raw.keys() - _NOT_KEPT):
            without = {name: value for name, value in raw.items() if name != field}
            for kind, changed in {"absent": without, "null": without | {field: None}}.items():
                try:
                    value = _read(changed, field)
                except Exception as error:  # whatever transformers raises
                    print(file.parent.name, field, kind, type(error).__name__, str(error)[:80].replace("\n", " "))
                    continue
                recorded.setdefault(file.parent.name, {}).setdefault(field, {})[kind] = value
    return recorded


if __name__ == "__main__":
    text = json.dumps(record(), indent=None, separators=(",", ":")).replace('"},', '"},\n').replace("}},", "}},\n")
    (_HERE / "class_defaults.json").write_text(text + "\n")
