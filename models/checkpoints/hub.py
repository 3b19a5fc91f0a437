"""Downloads a model from the Hugging Face hub, or finds it in the local cache when the hub cannot be reached.

After an interrupted download the cache holds only some of a model's files. Loading needs the config and all files of
the weights; a model that has these is used, whatever else is missing.
"""

import re
from pathlib import Path

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.adapter_files import refuse_adapter_alone
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.checkpoints.pickled_files import PICKLE_INDEX, SINGLE_PICKLE
from decodax.models.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE

_DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_PICKLED = ["pytorch_model*.bin"]  # downloaded where a model has no safetensors files
# Folders inside a repository hold other formats, and Mistral's consolidated files the same weights once more.
_IGNORED = ["*/*", "consolidated*"]
_BRANCH, _SNAPSHOTS = "main", "snapshots"
_ADVICE = "try again online, or pass the path of a local folder with its config.json and safetensors"


def download(name: str) -> Path:
    """The folder of the model with this id, downloaded if necessary.

    Raises FileNotFoundError for an invalid id, or one of no model.
    Raises PermissionError for a model whose licence has to be accepted.
    Raises ConnectionError if the hub cannot be reached and the cache does not hold what loading needs.
    """
    import huggingface_hub  # late: most runs never need it, and it is slow to import
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED, ignore_patterns=_IGNORED))
        if not any((folder / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_PICKLED, ignore_patterns=_IGNORED))
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
        return _cached(name, error)
    except (UnicodeDecodeError, IsADirectoryError) as error:  # of the file with the cache's revision
        return _cached(name, error)
    is_snapshot = _SNAPSHOTS not in folder.parts or folder.parent.name == _SNAPSHOTS
    if not is_snapshot or not _is_revision(folder.name):  # the library follows whatever that file says
        return _cached(name, None)
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # its folder may be incomplete
        _require_whole(name, folder)
    return folder


def _is_revision(name: str) -> bool:
    """Whether a snapshot can have this name: that of a single folder, such as a commit."""
    return name not in ("", ".", "..", _SNAPSHOTS) and re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None


def _cached(name: str, error: Exception | None) -> Path:
    """The cached snapshot of a model when the hub cannot be reached; ConnectionError if it is incomplete."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")
    reference = repository / "refs" / _BRANCH
    commit = reference.read_text(encoding="utf-8", errors="replace").strip() if reference.is_file() else ""
    snapshots = repository / _SNAPSHOTS
    if _is_revision(commit) and (snapshots / commit).is_dir():
        _require_whole(name, snapshots / commit)
        return snapshots / commit
    others = sorted(path.name for path in snapshots.glob("*") if path.is_dir())
    found = (
        f"the local cache has other revisions of it than {_BRANCH}: {printable_list(others)} in {printable(snapshots)}"
        if others
        else "the model is not in the local cache"
    )
    if reference.exists() and not _is_revision(commit):
        found += f", and {printable(reference)} is damaged"
    raise ConnectionError(
        f"{name} is not an existing folder and cannot be downloaded: the Hugging Face hub is out of reach (offline?) "
        f"and {found}; {_ADVICE}"
    ) from error


def _require_whole(name: str, folder: Path) -> None:
    """Raises ConnectionError, with the missing and the present files, if a snapshot lacks what loading needs."""
    refuse_adapter_alone(folder)
    if not (missing := _missing(folder)):
        return
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    blobs = folder.parent.parent / "blobs"
    interrupted = ", and a download was interrupted" if any(blobs.glob("*.incomplete")) else ""
    raise ConnectionError(
        f"the local cache holds {name} in part, and the Hugging Face hub is out of reach (offline?): missing are "
        f"{printable_list(missing, most=8)}; there are {printable_list(there, most=8) or 'no files'} in "
        f"{printable(folder)}{interrupted}; {_ADVICE}"
    )


def _missing(folder: Path) -> list[str]:
    """The missing files that loading needs; a link to a blob that is gone counts as missing."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if (folder / SINGLE_FILE).is_file():
        return missing
    index_file = INDEX_FILE
    if not (folder / INDEX_FILE).is_file():
        if (folder / SINGLE_PICKLE).is_file():
            return missing
        if not (folder / PICKLE_INDEX).is_file():
            return [*missing, f"{SINGLE_FILE} (or {INDEX_FILE} and its files)"]
        index_file = PICKLE_INDEX
    index = find_file(folder, index_file)
    weight_map = {} if index is None else read_json_object(index).get("weight_map")
    names = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
    return [*missing, *sorted(file for file in names if not (folder / file).is_file())]
