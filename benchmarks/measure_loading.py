"""Measures how much host memory a process takes that loads its shard of a checkpoint, on this machine's CPU.

    python -m benchmarks.measure_loading                        # 8 processes, each its eighth of a random 2 GB
    python -m benchmarks.measure_loading --form orbax --processes 4
    python -m benchmarks.measure_loading --model FOLDER         # a model of your own, its heads divisible by 8

The processes are real ones, connected by `jax.distributed`, with one device each, and the weights are sharded over them
(`tensor=8`). The count is Linux's resident memory (VmHWM of /proc/self/status, reset before loading), so with the
interpreter, JAX, and the pages of the mapped file that are in memory; files are written just before and are in the page
cache, which belongs to no process. Prints one line for each process, or with --json a document.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, FEED_FORWARD, VOCABULARY, LAYERS = 2048, 5632, 32_000, 19  # of the random model: 2.06 GB in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--model", type=Path, help="a model folder; default: random weights in a temporary one")
    parser.add_argument("--form", choices=("hf", "orbax"), default="hf", help="of the random model")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)  # index and port: one of the processes itself
    options = parser.parse_args()
    if options.process is not None:
        print(json.dumps(load_shard(int(options.process[0]), options.processes, options.process[1], options.model)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or random_model(Path(temporary) / "random", options.layers, options.form)
        results = run(folder, options.processes)
    if options.json:
        print(json.dumps(results))
        return
    for row in results:
        print(
            f"process {row['process']}: peak {row['peak_bytes'] / 1e6:.0f} MB, of it {row['own_bytes'] / 1e6:.0f} its "
            f"shard of the {row['model_bytes'] / 1e9:.2f} GB and {row['before_bytes'] / 1e6:.0f} before loading; "
            f"{row['seconds']:.1f} s"
        )


def random_model(folder: Path, num_layers: int, form: str) -> Path:
    """A llama with random weights in bfloat16, written as Hugging Face does or as an Orbax checkpoint."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    from decodax.models.checkpoints.write_orbax import (
        from_hf,  # late: a process that only loads starts with less memory
    )
    from decodax.models.configs.hf_config import read_config

    family, described = read_config(config)
    rng, tensors = np.random.default_rng(0), {}
    for name, path in family.tensor_names(described).items():
        weight: Any = described.weights()
        for key in path:
            weight = weight[key]
        tensors[name] = rng.standard_normal(weight.shape, np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return from_hf(folder, folder.with_name("orbax")).target if form == "orbax" else folder


def run(folder: Path, num_processes: int) -> list[dict[str, Any]]:
    """The measures of each process."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "benchmarks.measure_loading", "--model", str(folder)]
    command += ["--processes", str(num_processes), "--process"]
    processes = [
        subprocess.Popen([*command, str(index), str(port)], stdout=subprocess.PIPE, text=True, env=environment)
        for index in range(num_processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def load_shard(index: int, num_processes: int, port: str, folder: Path) -> dict[str, Any]:
    """Loads one process's shard of a model and returns its measures."""
    from time import monotonic

    import jax

    jax.distributed.initialize(f"localhost:{port}", num_processes, index)
    import decodax

    jax.block_until_ready(jax.device_put(np.ones(8)))
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = monotonic()
    lm = decodax.load(folder, dtype="bfloat16", mesh=f"tensor={num_processes}")
    seconds, peak = monotonic() - start, _status_bytes("VmHWM")
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(lm.params) for shard in leaf.addressable_shards)
    return {
        "process": index,
        "before_bytes": before,
        "peak_bytes": peak,
        "own_bytes": own,
        "model_bytes": lm.nbytes,
        "seconds": seconds,
    }


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this measurement needs Linux")


if __name__ == "__main__":
    main()
