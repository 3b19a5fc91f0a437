"""`decodax convert` converts a model from Hugging Face's form to Orbax's, or back."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.decoding.adapted import find_adapter
from decodax.models.checkpoints.conversion import absolute_target
from decodax.models.checkpoints.gguf.source import GGUFSource
from decodax.models.checkpoints.model_files import has_orbax_arrays
from decodax.models.checkpoints.model_source import source_of
from decodax.models.checkpoints.write_hf import MAX_SHARD_BYTES, to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.models.load import byte_progress, find_folder
from decodax.verification import Verification, verify

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Form(StrEnum):
    """The forms in which a model can be stored."""

    ORBAX = "orbax"
    HF = "hf"


_NAMES = {Form.ORBAX: "Orbax checkpoint", Form.HF: "Hugging Face folder"}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A model folder of either form, a GGUF file, or an id on the hub.")
    ],
    target: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it appears when complete.")],
    to: Annotated[
        Form | None, typer.Option(help="The form to write. Default: the one that SOURCE has not; hf for GGUF.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Round every weight to float32, bfloat16 or float16. Default: as stored; quantised ones as float32."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=N,...", help="To Orbax: cut the arrays so that each device of this mesh reads whole files."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="To Hugging Face: most bytes in a file. Default: 5GB.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA adapter of the PEFT library, a folder, to merge into the weights (may be repeated, in order)."
        ),
    ] = None,
    verified: Annotated[
        bool, typer.Option("--verify", help="Compare every weight, and the logits of random tokens, on both sides.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a checkpoint at TARGET; it stays until the new one is complete."),
    ] = False,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Convert a model between Hugging Face's form (safetensors) and Orbax's, or from GGUF; all can be loaded.

    The config and the tokenizer go with it. After an interruption the same command resumes; until the conversion is
    complete there is nothing at TARGET.
    """
    with session.reported_errors(debug):
        absolute_target(target)  # refused before anything is downloaded
        folder = find_folder(source)
        is_hf = not has_orbax_arrays(folder) and not isinstance(source_of(folder), GGUFSource)
        form = to or (Form.ORBAX if is_hf else Form.HF)
        adapters = [find_adapter(name, folder) for name in adapter or ()]
        options: dict[str, Any] = {"dtype": dtype, "adapters": adapters, "overwrite": overwrite}
        if form is Form.ORBAX:
            if max_shard_size is not None:
                raise typer.BadParameter("--max-shard-size is of Hugging Face's files, and Orbax's are written")
            options |= {"mesh": mesh}
        else:
            if mesh is not None:
                raise typer.BadParameter("--mesh cuts Orbax's arrays, and Hugging Face's files are written")
            options |= {"max_shard_bytes": MAX_SHARD_BYTES if max_shard_size is None else read_size(max_shard_size)}
        start = monotonic()
        with byte_progress(f"converting {folder.name}") as progress:
            done = (from_hf if form is Form.ORBAX else to_hf)(folder, target, **options, progress=progress)
        facts = {
            "source": str(folder),
            "adapters": [str(place) for place in adapters],
            "path": str(target),
            "form": form,
            "num_parameters": done.manifest["num_parameters"],
            "num_bytes": done.manifest["num_bytes"],
            "dtypes": done.manifest["dtypes"],
            "resumed_bytes": done.resumed_bytes,
            "seconds": monotonic() - start,
        }
        found = None
        if verified:
            with session.progress("comparing both sides"):
                found = verify(folder, target, dtype=dtype, adapters=adapters)
        _report(facts, found, as_json)
        if found is not None and not found.is_same:
            raise ValueError(_difference(target, found))


def read_size(text: str) -> int:
    """Bytes: a whole number, or one with a unit such as 500MB or 2GiB.

    Raises BadParameter for anything else.
    """
    digits = text.rstrip("BGIKMbgikm ")
    unit = text[len(digits) :].strip().upper()
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0 and unit in _UNITS):
        raise typer.BadParameter(f"a size is a whole number of bytes, or like 500MB, 5GB or 2GiB; got {text!r}")
    return int(digits) * _UNITS[unit]


def _report(facts: dict[str, Any], found: Verification | None, as_json: bool) -> None:
    if as_json:
        verification = None if found is None else asdict(found) | {"is_same": found.is_same}
        print(json.dumps(facts | {"verification": verification, "versions": session.versions()}))
        return
    size = f"{facts['num_parameters']:,} parameters, {facts['num_bytes']:,} bytes ({', '.join(facts['dtypes'])})"
    print(f"{facts['path']}: {_NAMES[facts['form']]}, {size}, {facts['seconds']:.1f} s")
    if facts["resumed_bytes"]:
        print(f"{facts['resumed_bytes']:,} of these bytes were there already")
    if found is not None and found.is_same:
        print("verified: all weights the same bit by bit, largest difference of logits 0")
    if found is not None and found.rounding_logit_difference is not None:
        print(f"rounding the weights changed logits by up to {found.rounding_logit_difference:.3g}")


def _difference(target: Path, found: Verification) -> str:
    names = ", ".join(found.differing[:3]) + (", ..." if len(found.differing) > 3 else "")
    weights = f"{len(found.differing)} weight(s) differ ({names})" if found.differing else "all weights are the same"
    return (
        f"{target} is not the model that it was made from: {weights}, and logits by up to "
        f"{found.largest_logit_difference:.3g}; convert it again with --overwrite"
    )
