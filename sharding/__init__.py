"""Splits a model over a mesh of devices: sharding rules, sharding constraints, and explicit parallelism methods.

XLA partitions most operations by the shardings of weights and states (`rules.py`, `constraints.py`). METHODS are the
algorithms that it does not find by itself, by the mesh axis that they use.
"""

if __name__ != "decodax.sharding":
    raise ImportError("sharding is a part of decodax: import decodax.sharding")

from decodax.core.lazy import Methods

METHODS = {
    "context": Methods(
        __name__, {"ring": "ring", "ulysses": "ulysses", "split_cache": "split_cache:merge_over_devices"}
    ),
    "pipeline": Methods(__name__, {"pipeline": "pipeline:Pipeline"}),
}
