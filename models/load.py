"""Loads a model that is ready to run from a folder, a Hugging Face id, or the demo model that decodax carries."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from decodax.core.arguments import refusal
from decodax.core.printable import printable
from decodax.core.weight import Weight
from decodax.kernels_pallas.selection import Implementation
from decodax.layers.execution import Execution
from decodax.models.checkpoints.adapter_files import refuse_adapter_alone
from decodax.models.checkpoints.adapters.source import adapted
from decodax.models.checkpoints.gguf.files import SUFFIX as GGUF_SUFFIX
from decodax.models.checkpoints.hub import download
from decodax.models.checkpoints.model_source import is_gguf_path, source_of
from decodax.models.checkpoints.reading import open_params, read_params, shardings_on
from decodax.models.config import ModelConfig
from decodax.models.configs.hf_config import load_config
from decodax.models.mesh_fitting import mesh_for
from decodax.models.model import Model, Params
from decodax.models.stacked_weights import in_stages
from decodax.models.tokenizers.generation_settings import read_end_token_ids
from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.sharding.pipeline import ONE_CHUNK, Pipeline
from decodax.sharding.rules import RULES, Rules
from decodax.sharding.stacks import stack_weights

if TYPE_CHECKING:
    from rich.progress import Progress

_DTYPES = ("float32", "bfloat16", "float16")
_SILENT_SECONDS = 1.0  # a progress bar that is shown for less only flickers


@dataclass(frozen=True, eq=False, repr=False)  # compared as an object: arrays have no single answer to ==
class LanguageModel:
    """A model with its weights and tokenizer.

    model: its pure functions.
    config: of the model.
    params: nested dictionary of arrays.
    tokenizer: None when the folder has none; input is then token ids.
    path: the folder it came from, or the GGUF file.
    end_token_ids: the ids that end a text.
    adapter: the `AuxiliaryWeights` of `layer_skip` merged into its weights (LoRA); None without them.
    """

    model: Model
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    path: Path
    end_token_ids: tuple[int, ...]
    adapter: Any = None

    def __repr__(self) -> str:
        """One line: everything in it would be pages."""
        leaves = jax.tree.leaves(jax.eval_shape(self.model.unstacked, self.params))
        count, config = sum(leaf.size for leaf in leaves), self.config
        sizes = f"{config.num_layers} layers of width {config.hidden_size:,}, {count:,} parameters in {self.dtype.name}"
        return f"LanguageModel({str(self.path)!r}: {sizes})"

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which the model computes."""
        return self.model.dtype(self.params)

    @property
    def is_abstract(self) -> bool:
        """Whether `params` are shapes without numbers (`load(abstract=True)`)."""
        return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params))

    def require_weights(self) -> None:
        """Raises ValueError for an abstract model."""
        if self.is_abstract:
            raise ValueError(
                "this model was loaded with abstract=True, and has the shapes of its weights without their numbers: "
                "load it again without"
            )

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes, without their padding on a mesh."""
        leaves = jax.tree.leaves(jax.eval_shape(self.model.unstacked, self.params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def load(
    path_or_id: str | Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    rules: Rules = RULES,
    invariant: bool = False,
    implementation: Implementation | None = None,
    sequence_parallel: bool = False,
    pipeline: Pipeline = ONE_CHUNK,
    abstract: bool = False,
    adapters: Sequence[Path] = (),
) -> LanguageModel:
    """Loads a model folder or a GGUF file; arguments and errors are those of `decodax.load`.

    adapters: folders of LoRA adapters of the PEFT library.
    """
    kind = working_dtype(dtype)
    folder = find_folder(path_or_id)
    source = source_of(folder)
    family, config = load_config(source)
    if adapters:
        source, config = adapted(source, family, config, adapters)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.check_vocabulary(config.vocab_size)
    end_token_ids = read_end_token_ids(source, config.vocab_size)
    fitted = None if mesh is None else mesh_for(mesh, config, rules)
    execution = Execution(implementation, fitted, rules, sequence_parallel=sequence_parallel, pipeline=pipeline)
    model = Model(config, invariant, execution)
    if implementation is not None:
        from decodax.models.layer_kernels import check_kernels  # late: only for who asks for kernels

        check_kernels(model, kind)
    if abstract:
        if source.holds_weights():
            open_params(source, family, config)
        return LanguageModel(model, config, abstract_params(model, kind), tokenizer, folder, end_token_ids)
    with byte_progress(f"loading {folder.name}") as progress:
        sharding_of = shardings_on(fitted, rules)
        opened = open_params(source, family, config)
        if model.stages is not None:
            opened = in_stages(opened, stack_weights(config.weights(), model.stages), model.stages)
        params = read_params(opened, dtype=kind, sharding_of=sharding_of, progress=progress)
    return LanguageModel(model, config, params, tokenizer, folder, end_token_ids)


def abstract_params(model: Model, dtype: jnp.dtype) -> Params:
    """The shapes, dtypes and shardings of a model's parameters."""
    sharding_of = shardings_on(model.execution.mesh, model.execution.rules)

    def shape(path: tuple[Any, ...], weight: Weight) -> jax.ShapeDtypeStruct:
        sharding = None if sharding_of is None else sharding_of(weight, tuple(key.key for key in path))
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype_in(dtype), sharding=sharding)

    is_weight = lambda leaf: isinstance(leaf, Weight)
    return jax.tree_util.tree_map_with_path(shape, model.weights(), is_leaf=is_weight)


def find_folder(path_or_id: str | Path | None) -> Path:
    """The local folder, or GGUF file, of a path or a hub id; downloads the latter if necessary."""
    if path_or_id is None:
        return Path(str(resources.files("decodax.models.demo")))
    if not str(path_or_id):
        raise FileNotFoundError("the name of the model is empty: pass a folder, an id like org/name, or None")
    try:
        path = Path(path_or_id).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; an unknown home folder
        raise FileNotFoundError(f"no such model folder: {printable(path_or_id)} ({printable(error)})") from error
    if is_folder:
        refuse_adapter_alone(path)
        return path
    if is_gguf_path(path):
        return path
    if path.is_file():
        raise FileNotFoundError(
            f"{printable(path)} is a file, and no GGUF file: pass the model's folder (with config.json and safetensors)"
        )
    if path.suffix == GGUF_SUFFIX:
        raise FileNotFoundError(f"no such file: {printable(path.absolute())}")
    name = str(path_or_id)
    organisation, _, rest = name.partition("/")
    is_id = isinstance(path_or_id, str) and organisation and rest and "/" not in rest and "\\" not in name
    if not is_id or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"no such model folder: {printable(path.absolute())} (a model on the Hugging Face hub is named like "
            "org/name)"
        )
    folder = download(name)
    refuse_adapter_alone(folder)
    return folder


def working_dtype(dtype: Any) -> jnp.dtype:
    """The dtype to load a model in; by default float32 on CPU and bfloat16 elsewhere; ValueError for an unknown one."""
    if dtype is None:
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        name = jnp.dtype(dtype).name
    except Exception:  # NumPy raises whatever the value's own conversion raises
        name = None
    if name not in _DTYPES:
        raise refusal("dtype", f"one of {', '.join(_DTYPES)} or None", dtype)
    return jnp.dtype(name)


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (bytes done, bytes in all) that shows a progress bar on stderr, if a terminal, after a second."""
    start, bar = monotonic(), None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and monotonic() - start > _SILENT_SECONDS and done < total:
            bar = _bar(label, done, total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _bar(label: str, done: int, total: int) -> "Progress":
    from rich.console import Console  # late: most models load within a second
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.start()
    bar.add_task(label, total=total, completed=done)
    return bar
