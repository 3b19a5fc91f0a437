"""What is damaged: each module has `cases(work)`, all its cases; their files stand in the folder `work`."""

from tests.fuzz.subjects import (
    config,
    generation_config,
    index,
    options,
    orbax,
    safetensors,
    tokenizer,
    trained_part,
)

SUBJECTS = {
    "config": config,
    "safetensors": safetensors,
    "index": index,
    "tokenizer": tokenizer,
    "trained_part": trained_part,
    "orbax": orbax,
    "options": options,
    "generation_config": generation_config,
}
