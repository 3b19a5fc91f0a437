"""Plans the mesh of a model on chips that need not exist: searched by a cost model, then compiled for TPU.

    plan = best_plans(config, parse_topology("v5e:4x4"), Workload(batch=8, context=2048))[0]
    decodax.load(folder, mesh=plan.split.text)

| file | what |
|---|---|
| `chips.py`, `network.py`, `topology.py` | data sheets of chips, times of collectives, slices by name |
| `split.py` | shardings of weights and states on a mesh of simulated devices: bytes per chip |
| `work.py`, `parts.py`, `mixture.py`, `cost.py` | the cost items of a forward; its time from a roofline |
| `memory.py`, `search.py`, `layerwise.py` | memory of a chip; all meshes; what one mesh per layer could gain |
| `long_context.py` | how many rows of what length fit |
| `compiled.py`, `hlo.py` | the programs themselves, compiled by libtpu without a TPU |
| `report.py`, `picture.py` | tables, JSON, a picture |
"""

if __name__ != "decodax.planning":
    raise ImportError("planning is a part of decodax: import decodax.planning")
