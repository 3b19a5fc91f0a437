"""Plans how a model lies on chips that are not there: searched by a cost model, then really compiled for TPU.

    plan = best_plans(config, parse_topology("v5e:4x4"), Workload(batch=8, context=2048))[0]
    decodax.load(folder, mesh=plan.split.text)

| file | what |
|---|---|
| `chips.py`, `network.py`, `topology.py` | what chips can do, what collectives cost, slices by name |
| `split.py` | how weights and states lie on a mesh of seats: bytes per chip |
| `work.py`, `parts.py`, `mixture.py`, `cost.py` | what a forward does, part by part; its time from a roofline |
| `memory.py`, `search.py`, `layerwise.py` | what lies on a chip; all meshes; what a layout per layer could gain |
| `long_context.py` | how many rows of which length fit |
| `compiled.py`, `hlo.py` | the programs themselves, compiled by libtpu without a TPU |
| `report.py`, `picture.py` | tables, JSON, a picture |
"""
