"""Decides where a conversion may write and what it may replace there; asked before and after the work.

It replaces only an empty folder, and, with overwrite, a folder that `convert` wrote (its `decodax.json` says so) or a
checkpoint of the format that is written, and only if it holds nothing else: whatever a user has put beside it would be
lost. It never replaces the folder of the source or one that holds it or what it links to, the home and the current
folder, a mount point, a file, or a link.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import parse_json_object
from decodax.models.checkpoints.orbax_files import FOLDER
from decodax.models.checkpoints.staged_folder import partial_of

MANIFEST = "decodax.json"

_OVERWRITE = "pass overwrite=True (--overwrite on the command line) to replace it"
_MOST_MANIFEST_BYTES = 2**24
# Of a checkpoint without a manifest; any other file may be a user's own.
_BESIDE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|"
    r"preprocessor_config|processor_config)\.json|vocab\.txt|merges\.txt|tokenizer\.model|chat_template\.jinja|"
    + re.escape(MANIFEST)
)
_WEIGHTS = {
    "hf": re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json"),
    "orbax": re.compile(
        rf"{FOLDER}/(_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+|"
        r"(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]+)|"
        r"[^/]+/(\.zarray|zarr\.json|c(/\d+)*|\d+([./]\d+)*))"
    ),
}
_NEEDED = {"hf": ("model.safetensors", "model.safetensors.index.json"), "orbax": (f"{FOLDER}/_METADATA",)}
_FORM_NAMES = {"hf": "a Hugging Face folder (safetensors)", "orbax": "an Orbax checkpoint"}


def check_place(target: Path) -> None:
    """Checks that `target` can be written, whatever is to be written there; missing parent folders will be made.

    Raises NotADirectoryError or PermissionError for its parent folder.
    Raises FileExistsError for a link, a file, a mount point, and a folder that holds the home or the current folder.
    """
    above = target.absolute().parent
    parent = next(folder for folder in (above, *above.parents) if os.path.lexists(folder))  # the others are made
    if not parent.is_dir():
        raise NotADirectoryError(f"{printable(target)} cannot be written: {printable(parent)} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{printable(target)} cannot be written: no permission to write in {printable(parent)}")
    if problem := _bad_place(target):
        raise FileExistsError(f"{printable(target)} {problem}: choose another name")


def _bad_place(target: Path) -> str | None:
    """Why what is there is never replaced; None: it may be, or there is nothing."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink():
        return "is a link, and links are not followed or replaced"
    if not target.is_dir():
        return "is there already and is no folder"
    own = {"the current folder": Path.cwd, "the home folder": Path.home}
    for name, find in own.items():
        try:
            place = find()
        except (OSError, RuntimeError):  # there is none
            continue
        if _holds(target, place):
            return f"is {name}, or holds it, and is not replaced"
    real = str(target.resolve())
    if os.path.ismount(target) or any(point == real or point.startswith(f"{real}/") for point in _mount_points()):
        return "is a mount point, or holds one, and cannot be replaced; a folder in it can be written"
    return None


def _mount_points() -> list[str]:
    """All mount points, bind mounts of the same file system included, which `os.path.ismount` does not see."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # only Linux has it
        return []
    paths = [line.split(" ")[4] for line in text.splitlines()]
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path) for path in paths]


def _holds(folder: Path, place: Path) -> bool:
    """Whether a place is this folder or inside it, by whatever names."""
    try:
        own, real = folder.stat(), place.resolve()
    except OSError:
        return False
    return any(one.exists() and os.path.samestat(own, one.stat()) for one in (real, *real.parents))


@dataclass(frozen=True)
class Target:
    """Where a conversion writes.

    path: of the folder.
    form: "hf" or "orbax".
    source_paths: the folder that is read, and all that is read through its links.
    overwrite: whether to replace a checkpoint that is there.
    """

    path: Path
    form: str
    source_paths: tuple[Path, ...]
    overwrite: bool

    def check(self) -> None:
        """Raises ValueError, FileExistsError or what `check_place` raises if the target must stay as it is."""
        if any(_holds(source, self.path.parent) or _holds(source, self.path) for source in self.source_paths[:1]):
            source = printable(self.source_paths[0])
            raise ValueError(f"the target {printable(self.path)} must not be the source {source}, nor be in it")
        check_place(self.path)
        partial = partial_of(self.path)
        if _holds(partial, self.source_paths[0]):
            raise ValueError(
                f"the source {printable(self.source_paths[0])} is in {printable(partial)}, where the target is "
                "made: choose another target, or move the source out of there"
            )
        if not os.path.lexists(self.path) or not any(self.path.iterdir()):
            return
        self.check_contents(self.path)
        if not self.overwrite:
            raise FileExistsError(f"{printable(self.path)} is there already: choose another name, or {_OVERWRITE}")

    def check_contents(self, folder: Path) -> None:
        """Raises an error if a folder holds what must not be removed, or is not what this target replaces."""
        for source in self.source_paths:
            if _holds(folder, source):
                raise ValueError(
                    f"{printable(folder)} must not be replaced, because it holds {printable(source)}, which is read: "
                    "choose another name"
                )
        problem = _bad_place(folder) or self._surplus(folder)
        if problem is not None:
            raise FileExistsError(
                f"{printable(folder)} is there already and {problem}: choose another name, or move it away"
            )

    def _surplus(self, folder: Path) -> str | None:
        """What a folder holds that no conversion wrote and no checkpoint has; None if there is nothing."""
        written = _written(folder)
        if written is None and not _is_checkpoint(folder, self.form):
            return f"is neither a folder that convert wrote nor {_FORM_NAMES[self.form]}"
        for name, is_file in _walk(folder):
            if written is not None:
                form, names = written
                is_known = name in names or (form == "orbax" and bool(_WEIGHTS[form].fullmatch(name)))
            else:
                is_known = bool(_BESIDE.fullmatch(name) or _WEIGHTS[self.form].fullmatch(name))
            if not (is_file and is_known):
                what = "which convert did not write" if written is not None else "which does not belong to a checkpoint"
                return f"holds {printable(name)}, {what}"
        return None


def source_paths(folder: Path) -> tuple[Path, ...]:
    """A model's folder or file, and all that is read through links in it."""
    if not folder.is_dir():
        return (folder,)
    links = [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
    for inside, _, names in os.walk(folder / FOLDER):
        links += [path for name in names if os.path.islink(path := os.path.join(inside, name))]
    return (folder, *(Path(link) for link in links))


def read_manifest(folder: Path) -> dict[str, object] | None:
    """The manifest of a converted folder; None for any other folder."""
    file = folder / MANIFEST
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_MANIFEST_BYTES:
            return None
        return parse_json_object(file.read_bytes(), str(file))
    except (OSError, ValueError):
        return None


def _written(folder: Path) -> tuple[str, frozenset[str]] | None:
    """The form of a folder that a conversion wrote, and the names in it; None for any other folder."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    form, names = manifest.get("form"), manifest.get("files")
    is_ours = str(manifest.get("written_by")).startswith("decodax ") and form in _WEIGHTS and isinstance(names, list)
    return (str(form), frozenset(map(str, names))) if is_ours and isinstance(names, list) else None


def _is_checkpoint(folder: Path, form: str) -> bool:
    return all(any((folder / name).is_file() for name in names) for names in (("config.json",), _NEEDED[form]))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """The entries of a folder that are not folders: their names relative to it, and whether they are regular files.

    Enters only folders that a checkpoint has; others are listed as entries.
    """
    folders: list[str] = [""]
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = f"{inside}{entry.name}"
                if entry.is_dir(follow_symlinks=False) and (inside or name == FOLDER):
                    folders.append(f"{name}/")
                else:
                    yield name, entry.is_file(follow_symlinks=False)


def written_files(weights: Iterable[str], beside: Iterable[str]) -> list[str]:
    """The names that a conversion writes into its target; for an Orbax checkpoint's arrays only their folder."""
    return sorted({*weights, *beside, "config.json", MANIFEST})
