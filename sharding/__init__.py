"""How a model is split over a mesh of devices: rules from axes to devices, and what devices then tell each other.

Most of it is XLA's work, which splits all operations by where weights and states lie (`rules.py`, `layout.py`). METHODS
are the ways that it does not find by itself, by the axis of the mesh that they serve.
"""

from decodax.sharding.pipeline import Pipeline
from decodax.sharding.ring import ring
from decodax.sharding.split_cache import merge_over_devices
from decodax.sharding.ulysses import ulysses

METHODS = {
    "context": {"ring": ring, "ulysses": ulysses, "split_cache": merge_over_devices},
    "pipeline": {"pipeline": Pipeline},
}

__all__ = ["METHODS"]
