"""Finds the text model in the `config.json` of a multimodal one, which has a config for each of its parts.

Only the text model is read: its fields are those of `text_config`, its tensors have the prefix that
`models/checkpoints/name_prefix.py` finds, and the tensors of the other parts are left out by their names.
"""

from collections.abc import Mapping
from typing import Any

from decodax.models.families import FAMILIES

# Names of tensors of other parts: encoders of images, video and sound, what projects their outputs, MTP heads.
OTHER_PARTS = (
    r"(?:model\.)?(?:vision|visual|image|video|audio|speech|multi_modal|multimodal|mm|embed_vision|embed_audio"
    r"|connector|projector|patch_merger|mtp)\w*\..*"
)
_OUTER = ("tie_word_embeddings", "quantization_config", "quantization")  # of the whole model, in some files


def is_multimodal(raw: Mapping[str, Any]) -> bool:
    """Whether these fields are of a model with several parts, of which one is a text model."""
    return str(raw.get("model_type")) not in FAMILIES and isinstance(raw.get("text_config"), Mapping)


def text_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text model of a multimodal one; those of any other model as they are."""
    if not is_multimodal(raw):
        return raw
    outer = {name: raw[name] for name in _OUTER if name in raw}
    return {**outer, **raw["text_config"]}


def other_parts(raw: Mapping[str, Any]) -> list[str]:
    """The fields with the configs of the parts that are not read."""
    if not is_multimodal(raw):
        return []
    nested = (name for name, value in raw.items() if name.endswith("_config") and isinstance(value, Mapping))
    return sorted({*nested} - {"text_config", *_OUTER})
