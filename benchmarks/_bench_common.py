"""Provides what the benchmarks share: random models, alternating rounds, the machine's description, the output.

Contestants are measured in alternation, one run of each per round, and compared by medians: on a shared machine, where
the speed drifts by a factor of two within minutes, only numbers from the same rounds are comparable.
"""

import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._json_file import write_json_file
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.checkpoints.reading import host_buffer
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model, Params

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("decodax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "llama-cpp-python", "gguf")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model with an untied head."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 8192

    def model(self) -> Model:
        norm = RMSNormConfig(self.norm_eps)
        rope = Rope(self.head_size, self.rope_base)
        mixer = GQAConfig(self.num_heads, self.num_kv_heads, self.head_size, rope, scale=self.head_size**-0.5)
        block = pre_norm_block(mixer, GatedMLPConfig(self.intermediate_size), norm)
        blocks = (block,) * self.num_layers
        return Model(ModelConfig(self.vocab_size, self.hidden_size, self.max_positions, blocks, norm, False))

    def hf_config(self) -> dict[str, Any]:
        """The same sizes as arguments of transformers' `LlamaConfig`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_base},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


def random_params(model: Model, seed: int, dtype: Any = jnp.float32) -> Params:
    """Random weights made on the device, one tensor at a time (the generator is the fast one of the platform)."""
    key = jax.random.key(seed, impl="rbg")
    described, structure = jax.tree.flatten(model.config.weights())

    def draw(index: int, weight: Any) -> jax.Array:
        return as_loaded(jax.jit(lambda key: weight.initial(key, dtype))(jax.random.fold_in(key, index)))

    weights = list(enumerate(described))
    drawn = [draw(index, weight) for index, weight in track(weights, "random weights", transient=True)]
    return jax.block_until_ready(jax.tree.unflatten(structure, drawn))


def as_loaded(array: jax.Array) -> jax.Array:
    """The array in memory as `decodax.load` reads weights on CPU; on other devices unchanged."""
    if jax.default_backend() != "cpu":
        return array
    host = host_buffer(array.shape, array.dtype)
    host[...] = array
    return jax.device_put(host, may_alias=True)


def weight_bytes_read(params: Params) -> int:
    """Bytes of weights that one decoding step reads: all but the embedding, of which it reads one vector per token."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes


def full_forward_greedy(model: Model, params: Params, tokens: np.ndarray) -> np.ndarray:
    """The best next token at every position: what greedy decoding must give where `tokens` holds prompt and output."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = jax.jit(lambda params, tokens: model.apply(params, tokens, position).hidden)
    best = jax.jit(lambda params, hidden: jnp.argmax(model.logits(params, hidden), axis=-1))
    return np.asarray(best(params, hidden(params, jnp.asarray(tokens))))


def require_equal_tokens(name: str, got: np.ndarray, expected: np.ndarray) -> None:
    """The correctness gate.

    Raises SystemExit when a contestant does not give the reference's tokens.
    """
    if not np.array_equal(got, expected):
        different = np.argwhere(np.asarray(got) != np.asarray(expected))
        where = different[0].tolist() if len(different) else f"shapes {np.shape(got)} and {np.shape(expected)}"
        raise SystemExit(f"correctness gate: {name} gives other greedy tokens than the reference (first at {where})")


def alternate(
    contestants: dict[str, Callable[[], dict[str, float]]], rounds: int, pause_s: float = 0.2
) -> dict[str, dict[str, list[float]]]:
    """Runs every contestant once per round, and once before to warm up; {name: {quantity: one value per round}}."""
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    schedule = [(turn, name) for turn in range(rounds + 1) for name in contestants]
    for turn, name in track(schedule, f"{rounds} rounds of {len(contestants)}", transient=True):
        values = contestants[name]()
        if turn:
            for quantity, value in values.items():
                measured[name].setdefault(quantity, []).append(value)
        time.sleep(pause_s)  # threads of the one before stop spinning
    return measured


def summary(values: Sequence[int | float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": float(statistics.median(values)), "min": float(min(values)), "max": float(max(values))}


def summarise(measured: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {key: summary(values) for key, values in by.items()} for name, by in measured.items()}


def machine() -> dict[str, Any]:
    """Date, device and versions, for the head of a result file."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.local_device_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    """The processor's name and number of cores, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    cores = sum(line.startswith("processor") for line in lines)
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family}), {cores} cores"


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_json_file(path, result)
    Console().print(f"wrote {path}", soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
