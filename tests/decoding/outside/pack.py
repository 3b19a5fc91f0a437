"""Builds the wheel of this package: the one function that pip asks of a build backend (PEP 517)."""

import zipfile
from pathlib import Path


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "own_methods-0.1-py3-none-any.whl", "own_methods-0.1.dist-info"
    files = {
        **{path.as_posix(): path.read_text(encoding="utf-8") for path in sorted(Path("own_methods").glob("*.py"))},
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: own-methods\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: pack\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
    return name
