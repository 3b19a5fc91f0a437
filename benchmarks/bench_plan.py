"""Measures whether the planner chooses the fastest mesh: every mesh of 8 CPU devices, predicted and timed.

    python -m benchmarks.bench_plan
    python -m benchmarks.bench_plan --size tiny --rounds 1    # to see that it works

The cost model gets rates that are measured first, by themselves, on all devices at once: products of a few tokens
(bytes of weights per second), of many (operations per second), and all-reduces over 2, 4 and 8 devices. Then the gate:
every mesh gives the greedy tokens of one device. Then a decoding step of every mesh, in alternating rounds.

Eight devices of one CPU share its cores and its memory. So more devices do not compute faster here, a copy of a weight
on another device costs as much as the weight, and an all-reduce waits for threads that have no core of their own. The
measurement shows whether the model ranks meshes correctly from rates, not what a machine with eight chips would do.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from benchmarks import _bench_common as common
from decodax import decoding
from decodax.core.linear import linear
from decodax.core.weight import Weight
from decodax.layers.execution import Execution
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model, Params
from decodax.planning.chips import Chip
from decodax.planning.memory import Workload
from decodax.planning.network import Switch
from decodax.planning.search import Plan, degrees, plan_for
from decodax.planning.topology import Topology
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES, place

NUM_DEVICES = 8
SHAPES = {
    "wide": common.Shape(4, 512, 8, 8, 64, 1536, 4096),  # whose weights are worth sharding
    "narrow": common.Shape(4, 64, 8, 8, 8, 192, 512),  # whose all-reduces take longer than its weights
    "tiny": common.Shape(2, 32, 8, 8, 8, 48, 64),
}
BATCH = 8
TOKENS = {"wide": (32, 48), "narrow": (32, 48), "tiny": (5, 6)}  # prompt, new
ALL_REDUCE_SIZES = (1 << 12, 1 << 16, 1 << 20)  # bytes
REPEATED = 16  # all-reduces or products in a row, to time one of them
TARGETS = {"measured seconds of the chosen mesh, over the best": 1.1}


def seconds_of(run: Callable[[], Any], times: int = 7) -> float:
    """The median of several runs, after one that compiles."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def product_seconds(shape: common.Shape, num_tokens: int) -> float:
    """Seconds of a feed-forward product with its own weight, on all devices at once; one of several in a row."""
    mesh = Mesh(np.array(jax.devices()[:NUM_DEVICES]), ("all",), axis_types=(AxisType.Auto,))
    wide, narrow = shape.intermediate_size, shape.hidden_size
    own, same = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    ones = jnp.ones((NUM_DEVICES * wide, narrow), jnp.float32)
    weights = [jax.device_put(ones, own) for _ in range(REPEATED)]
    tokens = jax.device_put(jnp.ones((num_tokens, narrow), jnp.float32), same)

    def local(tokens, weights):
        for weight in weights:  # each waits for the one before
            tokens = tokens + 1e-9 * linear(tokens, weight)[:, :narrow]
        return tokens

    def taken(how_often: int) -> float:
        specs = (PartitionSpec(), [PartitionSpec("all")] * how_often)
        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("all"), check_vma=False))
        return seconds_of(lambda: run(tokens, weights[:how_often]))

    return _one_of(taken)


def _one_of(taken: Callable[[int], float]) -> float:
    """Seconds of one of several in a row, without the time to start the program."""
    return max(taken(REPEATED) - taken(1), 1e-9) / (REPEATED - 1)


def all_reduce_seconds(count: int, num_bytes: int) -> float:
    """Seconds of one all-reduce over groups of `count` devices, of `num_bytes` on each; all groups at once."""
    devices = np.array(jax.devices()[:NUM_DEVICES]).reshape(-1, count)
    mesh = Mesh(devices, ("groups", "summed"), axis_types=(AxisType.Auto,) * 2)
    array = jax.device_put(jnp.ones(num_bytes // 4, jnp.float32), NamedSharding(mesh, PartitionSpec()))

    def local(array, how_often):
        for _ in range(how_often):
            array = jax.lax.psum(array, "summed") * (1 / count)
        return array

    def taken(how_often: int) -> float:
        spec = PartitionSpec()
        run = jax.shard_map(
            partial(local, how_often=how_often), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        run = jax.jit(run)
        return seconds_of(lambda: run(array))

    return _one_of(taken)


def measured_network() -> tuple[Switch, dict[str, float]]:
    """The cost of an all-reduce here: a launch, a latency per step and the bytes, fitted to all groups and sizes."""
    rows, taken, listed = [], [], {}
    for count in (2, 4, 8):
        for num_bytes in ALL_REDUCE_SIZES:
            seconds = all_reduce_seconds(count, num_bytes)
            steps = 2 * (count - 1)
            # Small ones count as much as large ones: each equation is divided by its own time.
            rows.append(np.array([1, steps, num_bytes * steps / count]) / seconds)
            taken.append(1.0)
            listed[f"{count} devices, {num_bytes} bytes"] = seconds
    launch, step, per_byte = _not_negative(np.array(rows), np.array(taken))
    return Switch(bandwidth=1 / max(per_byte, 1e-12), launch_seconds=launch, step_seconds=step), listed


def _not_negative(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares without negative coefficients: these become 0."""
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
        if found.min() >= 0:
            break
        used.pop(int(found.argmin()))
    values = dict(zip(used, found, strict=True))
    return [float(values.get(index, 0.0)) for index in range(matrix.shape[1])]


def measured_chip(shape: common.Shape) -> tuple[Chip, dict[str, Any]]:
    """This machine's devices, each with its speed while all work; and the measured rates."""
    network, all_reduces = measured_network()
    few, many = product_seconds(shape, BATCH), product_seconds(shape, 512)
    size = shape.intermediate_size * shape.hidden_size
    rates = {"memory_bandwidth": 4 * size / few, "flops": 2 * size * 512 / many}
    chip = Chip(
        name="cpu",
        title=f"one of {NUM_DEVICES} devices of this CPU",
        memory_bytes=2**34,
        usable_bytes=2**34,
        memory_bandwidth=rates["memory_bandwidth"],
        bf16_flops=rates["flops"],
        int8_ops=rates["flops"],
        network=network,
        host_bandwidth=rates["memory_bandwidth"],
        slices=((NUM_DEVICES,),),
    )
    return chip, rates | {"network": dataclasses.asdict(network), "seconds of an all-reduce": all_reduces}


def plans_of(size: str, chip: Chip) -> dict[str, Plan]:
    """Every mesh that divides the model and the batch, but for pipelines, whose stages are programs of their own."""
    config, topology = SHAPES[size].model().config, Topology(chip, (NUM_DEVICES,))
    workload = Workload(BATCH, sum(TOKENS[size]), "float32")
    found = {}
    for sizes in degrees(config, NUM_DEVICES, BATCH):
        if sizes["pipeline"] == 1:
            try:
                plan = plan_for(config, topology, workload, sizes)
            except ValueError:  # does not divide
                continue
            found[plan.split.text] = plan
    return found


def on_mesh(model: Model, params: Params, text: str) -> tuple[Model, Params]:
    """The model and its weights over this mesh, sharded as by `decodax.load`."""
    mesh = fit_mesh(read_mesh(text, jax.devices()[:NUM_DEVICES]), model.config)
    put = partial(place, mesh, RULES)
    described = model.config.weights()
    placed = jax.tree.map(
        lambda weight, leaf: put(leaf, weight, "weight"), described, params, is_leaf=lambda x: isinstance(x, Weight)
    )
    return Model(model.config, execution=Execution(None, mesh)), placed


class Runner:
    """Decoding over one mesh, or on one device."""

    def __init__(self, size: str, model: Model, params: Params) -> None:
        self.model, self.params = model, params
        self.num_prompt, self.num_new = TOKENS[size]
        self.prompt = np.random.default_rng(0).integers(0, SHAPES[size].vocab_size, (BATCH, self.num_prompt))
        self.decode = jax.jit(decoding.autoregressive(model), donate_argnums=1)

    def start(self) -> Any:
        lengths, seed = np.full(BATCH, self.num_prompt), np.arange(BATCH, dtype=np.uint32)
        state = decoding.prefill(self.model, self.params, self.prompt.astype(np.int32), lengths, self.num_new, seed)
        return jax.block_until_ready(state)

    def tokens(self) -> np.ndarray:
        state = self.decode(self.params, self.start())
        return np.asarray(state.tokens)[:, self.num_prompt : self.num_prompt + self.num_new]

    def __call__(self) -> dict[str, float]:
        state = self.start()
        begin = time.perf_counter()
        jax.block_until_ready(self.decode(self.params, state))
        return {"ms per token": (time.perf_counter() - begin) / self.num_new * 1e3}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), action="append", help="may be repeated; default: wide, narrow")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "bench_plan_cpu.json")
    options = parser.parse_args(arguments)
    sizes = {size: compare(size, options.rounds) for size in options.size or ("wide", "narrow")}
    head = common.machine() | {"batch": BATCH, "targets": TARGETS}
    common.write_json(options.output, head | {"sizes": sizes})


def compare(size: str, rounds: int) -> dict[str, Any]:
    """Every mesh for a model of this size: predicted, checked, measured."""
    model = SHAPES[size].model()
    params = common.random_params(model, seed=0)
    Console().print(f"{size}: rates of this machine")
    chip, rates = measured_chip(SHAPES[size])
    plans = plans_of(size, chip)
    runners = {text: Runner(size, *on_mesh(model, params, text)) for text in plans}
    Console().print("correctness gate: greedy tokens of every mesh against one device")
    expected = Runner(size, model, params).tokens()
    for text, runner in runners.items():
        common.require_equal_tokens(text, runner.tokens(), expected)
    measured = common.summarise(common.alternate(dict(runners), rounds))
    shape = {"shape": dataclasses.asdict(SHAPES[size]), "tokens": TOKENS[size]}
    return shape | {"rates": rates} | report(size, plans, measured)


def report(size: str, plans: dict[str, Plan], measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Predicted beside measured, the best prediction first."""
    order = sorted(plans, key=lambda text: plans[text].seconds_per_token)
    took = {text: measured[text]["ms per token"]["median"] for text in order}
    best = min(took, key=took.__getitem__)
    rows = [
        [text, plans[text].seconds_per_token * 1e3, took[text], took[text] / took[best], plans[text].token.limit]
        for text in order
    ]
    columns = ["mesh", "predicted ms", "measured ms", "over the best", "limited by"]
    common.print_table(f"{size}: a decoding step of {BATCH} rows", columns, rows)
    listed = {
        text: {"predicted ms": plans[text].seconds_per_token * 1e3, "measured ms": measured[text]["ms per token"]}
        for text in order
    }
    return {"meshes": listed, "chosen": order[0], "best": best, "chosen over best": took[order[0]] / took[best]}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    main()
