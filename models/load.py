"""From a name to a model that is ready to run: a folder, a Hugging Face id, or the small model that decodax carries."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from decodax.arguments import refusal
from decodax.kernels_pallas.choice import Implementation
from decodax.layers.execution import Execution
from decodax.models.checkpoint import open_params, read_params, shardings_on
from decodax.models.config import ModelConfig
from decodax.models.hf_config import load_config
from decodax.models.model import Model, Params
from decodax.models.stacked_weights import in_stages
from decodax.models.tokenizer import Tokenizer, read_end_token_ids
from decodax.sharding.mesh import fit_mesh, read_mesh
from decodax.sharding.pipeline import ONE_CHUNK, Pipeline
from decodax.sharding.rules import RULES, Rules

if TYPE_CHECKING:
    from rich.progress import Progress

_DTYPES = ("float32", "bfloat16", "float16")
_SILENT_SECONDS = 1.0  # a progress bar for less only flickers
_HUB_FILES = ["*.json", "*.safetensors"]
# Folders inside a repository hold other formats, and Mistral's consolidated files the same weights once more.
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True, eq=False)  # compared as an object: arrays have no single answer to ==
class LanguageModel:
    """A model with its weights and tokenizer.

    model: its pure functions. params: nested dictionary of arrays. tokenizer: None when the folder has none, which
    leaves token ids as input. path: the folder it came from. end_token_ids: the ids that end a text. adapter: the
    `TrainedPart` whose change its weights hold, None where they are those of the folder.
    """

    model: Model
    config: ModelConfig = field(repr=False)
    params: Params = field(repr=False)
    tokenizer: Tokenizer | None
    path: Path
    end_token_ids: tuple[int, ...]
    adapter: Any = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


def load(
    path_or_id: str | Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    rules: Rules = RULES,
    invariant: bool = False,
    implementation: Implementation | None = None,
    scatter_norms: bool = False,
    pipeline: Pipeline = ONE_CHUNK,
) -> LanguageModel:
    """A model folder, as it is; arguments and errors are those of `decodax.load`."""
    kind = working_dtype(dtype)
    folder = find_folder(path_or_id)
    family, config = load_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    end_token_ids = read_end_token_ids(folder)
    mesh = read_mesh(mesh) if isinstance(mesh, str) else mesh
    fitted = None if mesh is None else fit_mesh(mesh, config)
    execution = Execution(implementation, fitted, rules, scatter_norms=scatter_norms, pipeline=pipeline)
    model = Model(config, invariant, execution)
    with byte_progress(f"loading {folder.name}") as progress:
        sharding_of = shardings_on(fitted, rules)
        opened = open_params(folder, family, config)
        if model.stages is not None:
            opened = in_stages(opened, model.weights(), model.stages)
        params = read_params(opened, dtype=kind, sharding_of=sharding_of, progress=progress)
    return LanguageModel(model, config, params, tokenizer, folder, end_token_ids)


def find_folder(path_or_id: str | Path | None) -> Path:
    """The local folder that a path or a hub id stands for; downloads the latter if it has to."""
    if path_or_id is None:
        return Path(str(resources.files("decodax.models.demo")))
    if not str(path_or_id):
        raise FileNotFoundError("the name of the model is empty: pass a folder, an id like org/name, or None")
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file: pass the model's folder (with config.json and safetensors)")
    name = str(path_or_id)
    organisation, _, rest = name.partition("/")
    is_id = isinstance(path_or_id, str) and organisation and rest and "/" not in rest and "\\" not in name
    if not is_id or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"no such model folder: {path.absolute()} (a model on the Hugging Face hub is named like org/name)"
        )
    return _download(name)


def _download(name: str) -> Path:
    import huggingface_hub  # late: most runs never need it, and it is slow to import
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{name} is neither an existing folder nor a valid Hugging Face id: {error}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} asks for its licence to be accepted on huggingface.co; do so and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither an existing folder nor a model on the Hugging Face hub that you may read"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{name} is not an existing folder and cannot be downloaded: the Hugging Face hub is out of reach "
            "(offline?) and the model is not in the local cache. Pass the path of a local folder with its config.json "
            "and safetensors, or try again online"
        ) from error


def working_dtype(dtype: Any) -> jnp.dtype:
    """What a model is loaded with: float32 on CPU and bfloat16 elsewhere by default; ValueError for an unknown one."""
    if dtype is None:
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        name = jnp.dtype(dtype).name
    except Exception:  # NumPy raises whatever it meets on its way into the value
        name = None
    if name not in _DTYPES:
        raise refusal("dtype", f"one of {', '.join(_DTYPES)} or None", dtype)
    return jnp.dtype(name)


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (bytes done, bytes in all) that shows a bar on stderr, if that is a terminal, after a second."""
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
