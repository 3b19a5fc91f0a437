"""Lists the weight formats that are read, by the `quant_method` of their configs; one per file of that name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods

if TYPE_CHECKING:
    from decodax.models.checkpoints.formats.contract import Format

FORMATS: "Mapping[str, Format]" = Methods(
    __name__,
    {
        "awq": "FORMAT",
        "bitsandbytes": "FORMAT",
        "compressed-tensors": "compressed_tensors:FORMAT",
        "fp8": "FORMAT",
        "gptq": "FORMAT",
        "mlx": "FORMAT",
        "mxfp4": "FORMAT",
    },
)
