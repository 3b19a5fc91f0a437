"""Lists the subjects that are damaged: each module's `cases(work)` gives all its cases, with files in folder `work`."""

from tests.fuzz.subjects import (
    auxiliary_weights,
    config,
    generation_config,
    index,
    options,
    orbax,
    safetensors,
    tokenizer,
)

SUBJECTS = {
    "config": config,
    "safetensors": safetensors,
    "index": index,
    "tokenizer": tokenizer,
    "auxiliary_weights": auxiliary_weights,
    "orbax": orbax,
    "options": options,
    "generation_config": generation_config,
}
