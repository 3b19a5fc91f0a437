"""Orbax checkpoints of every form are read, and damaged ones refused before anything is allocated."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zlib

import jax
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore

import decodax
from decodax.models.checkpoints.name_map import full_region
from decodax.models.checkpoints.reading import open_params
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.models.checkpoints.zarr_metadata import read_v3
from decodax.models.configs.hf_config import load_config
from tests.golden_files import load_golden
from tests.models.test_compressed_chunks import zstd_runs

LLAMA = load_golden("llama").folder
FORMS = {
    "decodax": None,
    "plain": {"use_ocdbt": False, "use_zarr3": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "database": {"use_ocdbt": True, "use_zarr3": False},
    "zarr3_database": {"use_ocdbt": True, "use_zarr3": True},
}


def numbers(folder):
    """All weights of a folder, as they are stored."""
    opened = open_params(folder, *load_config(folder))
    return {
        path: opened.read(path, full_region(weight.shape), opened.dtype(path))
        for path, weight in opened.weights.items()
    }


@pytest.fixture(scope="module")
def expected():
    return numbers(LLAMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory, expected):
    """The same model in every form of a checkpoint."""
    folders = {form: tmp_path_factory.mktemp(form) / "model" for form in FORMS}
    from_hf(LLAMA, folders["decodax"])
    tree = jax.tree.map(np.asarray, decodax.load(LLAMA).params)
    for form, options in FORMS.items():
        if options is not None:
            shutil.copytree(folders["decodax"], folders[form])
            shutil.rmtree(folders[form] / "params")
            handler = orbax.checkpoint.PyTreeCheckpointHandler(**options)
            orbax.checkpoint.Checkpointer(handler).save(folders[form] / "params", tree)
    return folders


@pytest.fixture
def folder_of(written, tmp_path):
    """A copy to be damaged."""
    return lambda form: shutil.copytree(written[form], tmp_path / form, dirs_exist_ok=True)


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert array.dtype == expected[path].dtype
        np.testing.assert_array_equal(array.view(np.uint8), expected[path].view(np.uint8))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(written, expected, form):
    same(numbers(written[form]), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_chunk_is_named(folder_of, form):
    """In a database as well: there the array's only chunk is removed."""
    folder = folder_of(form)
    chunk = "c/0/0" if "zarr3" in form else "0.0"
    if "database" in form:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/params/"}}
        tensorstore.KvStore.open(spec).result().write(f"head/{chunk}", None).result()
    else:
        (folder / "params" / "head" / chunk).unlink()
    for use in (decodax.load, lambda folder: to_hf(folder, folder.with_name("back"))):
        with pytest.raises(ValueError, match=rf"head/{chunk} .*is missing, a chunk of the array head \[67, 30\]"):
            use(folder)
    assert not folder.with_name("back").exists()


def test_a_chunk_among_many(tmp_path, monkeypatch):
    monkeypatch.setattr("decodax.models.checkpoints.orbax_writing.CHUNK_BYTES", 1000)
    from_hf(LLAMA, tmp_path / "orbax")
    (tmp_path / "orbax" / "params" / "embedding" / "7.0").rename(tmp_path / "orbax" / "params" / "embedding" / "07.0")
    with pytest.raises(ValueError, match=r"embedding/7.0 is missing, a chunk of the array embedding"):
        decodax.load(tmp_path / "orbax")


@pytest.mark.parametrize("form", ["decodax", "zarr3"])
def test_chunks_that_older_versions_left_out(folder_of, expected, form):
    """Without the field Orbax did not store chunks of zeros, and reads them as zeros; they are named here."""
    folder = folder_of(form)
    metadata = json.loads((folder / "params" / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    (folder / "params" / "_METADATA").write_text(json.dumps(metadata))
    same(numbers(folder), expected)
    (folder / "params" / "final_norm.weight" / ("c/0" if form == "zarr3" else "0")).unlink()
    with pytest.warns(
        UserWarning, match=r"1 chunk\(s\) are not stored in .*params \(final_norm.weight\) and are taken"
    ):
        found = numbers(folder)
    same(found, expected | {("final_norm", "weight"): np.zeros(30, np.float32)})


ZARRAY = {
    "chunks": [[2**40, 1], [0, 30], [-1, 30], [67], [67, 30, 1], [1.5, 30], [True, 30], None, "67", {}, [68, 30]],
    "shape": [[2**40, 30], [-67, 30], [], [67.0, 30], None, [[67], 30], [1] * 1000],
    "dtype": [">i4", "<M8[s]", "|O", "|S4", [["a", "<f4"]], None, 3, "x\x1b[2J"],
    "compressor": [{"id": "blosc"}, {"id": "lz4"}, {}, {"id": None}, 3, "zstd"[:3], [], True],
    "fill_value": [True, [0], {}, "zero"],
    "filters": [[{"id": "delta"}], [], 0],
    "order": ["F", None, "c"],
    "dimension_separator": ["", "..", "-", 3, None],
    "zarr_format": [1, 3, 2.0, None],
}


@pytest.mark.parametrize("field", ZARRAY)
def test_absurd_metadata_of_an_array(folder_of, field):
    folder = folder_of("decodax")
    file = folder / "params" / "head" / ".zarray"
    before = file.read_text()
    for value in ZARRAY[field]:
        change(file, **{field: value})
        with pytest.raises(ValueError) as caught:
            decodax.load(folder)
        assert ".zarray: " in str(caught.value) or " head " in str(caught.value), value
        assert "FAILED_PRECONDITION" not in str(caught.value), value
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000
        file.write_text(before)


ZARR3 = {
    "chunk_grid": [{"name": "x"}, {"name": "regular", "configuration": {"chunk_shape": [2**40, 1]}}, None, []],
    "chunk_key_encoding": [{"name": "x"}, {"name": "default", "configuration": {"separator": ""}}, 3],
    "codecs": [
        [],
        None,
        [{"name": "bytes"}, {"name": "gzip"}],
        [{"name": "transpose"}, {"name": "bytes"}],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [0, 1]}}],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [2, 30], "codecs": [{"name": "bytes"}]}}],
    ],
    "data_type": ["int32", "r8", {"name": "x"}, None],
    "shape": [[2**40, 30], [-1, 30], None],
    "node_type": ["group"],
    "storage_transformers": [[{"name": "x"}]],
}


@pytest.mark.parametrize("field", ZARR3)
def test_absurd_metadata_of_version_3(folder_of, field):
    folder = folder_of("zarr3")
    file = folder / "params" / "head" / "zarr.json"
    before = file.read_text()
    for value in ZARR3[field]:
        change(file, **{field: value})
        with pytest.raises(ValueError, match=r"zarr.json: | head "):
            decodax.load(folder)
        file.write_text(before)


METADATA = {
    "{": "is no valid JSON",
    "[]": "must hold a JSON object",
    '{"tree_metadata": 3}': "must have tree_metadata with a list key_metadata",
    '{"tree_metadata": {"a": {"key_metadata": [{}]}}}': "must have tree_metadata with a list key_metadata",
    '{"a":' * 100_000: "nested deeper than",
    '{"tree_metadata": {"a": {"key_metadata": [{"key": "../../secret"}]}}}': "which is no name of a file",
    '{"tree_metadata": {"a": {"key_metadata": [{"key": "."}, {"key": ""}]}}}': "which is no name of a file",
    '{"tree_metadata": {"a": {"key_metadata": [{"key": ""}]}}}': "which is no name of a file",
    '{"tree_metadata": {"a": {"key_metadata": [{"key": "a\\u0000"}]}}}': "which is no name of a file",
    '{"tree_metadata": {}, "use_ocdbt": 1}': "must have use_ocdbt true or false, got 1",
    '{"tree_metadata": {}, "use_zarr3": "no"}': "must have use_zarr3 true or false, got no",
    '{"tree_metadata": {}, "use_ocdbt": true}': "manifest.ocdbt is missing",
    '{"tree_metadata": {}}': "missing: embedding",
}


@pytest.mark.parametrize("content", METADATA, ids=list(METADATA.values()))
def test_damaged_metadata_of_a_checkpoint(folder_of, content):
    folder = folder_of("decodax")
    (folder / "params" / "_METADATA").write_text(content)
    with pytest.raises(ValueError, match=METADATA[content]):
        decodax.load(folder)


def test_damaged_metadata_of_an_array(folder_of):
    folder = folder_of("decodax")
    for content, problem in {
        '{"a":' * 100_000: "nested deeper than",
        "[]": "must hold a JSON object",
        " " * 2**21: "has 2,097,152 bytes, and an array's metadata at most",
        "": "is no valid JSON",
    }.items():
        (folder / "params" / "head" / ".zarray").write_text(content)
        with pytest.raises(ValueError, match=rf"head/.zarray .*{problem}"):
            decodax.load(folder)


def test_only_regular_files_are_read(folder_of, tmp_path):
    """Reading a pipe would wait for ever; a link may lead anywhere."""
    outside = tmp_path / "outside"
    folder = folder_of("decodax")
    shutil.copytree(folder / "params", outside)
    for name in ("_METADATA", "head/.zarray", "head/0.0"):
        file = folder / "params" / name
        content = file.read_bytes()
        for make, problem in {
            os.mkfifo: "must be a regular file",
            lambda file: file.symlink_to(outside / file.name): "outside the model's folder|which is not there",
            lambda file: file.symlink_to("/dev/zero"): "outside the model's folder",
            lambda file: file.symlink_to(file.name): "which is not there",
        }.items():
            file.unlink()
            make(file)
            with pytest.raises(ValueError, match=rf"{name} .*({problem})"):
                decodax.load(folder)
        file.unlink()
        file.write_bytes(content)
    shutil.rmtree(folder / "params" / "head")
    (folder / "params" / "head").symlink_to(outside / "head")
    with pytest.raises(ValueError, match=r"params/head is a link to .*outside"):
        decodax.load(folder)
    shutil.rmtree(folder / "params")
    (folder / "params").symlink_to(outside)
    with pytest.raises(ValueError, match=r"_METADATA is a link to .*outside the model's folder"):
        decodax.load(folder)


def test_a_link_into_the_folder_is_followed(folder_of, expected):
    folder = folder_of("decodax")
    (folder / "blobs").mkdir()
    (folder / "params" / "head" / "0.0").rename(folder / "blobs" / "1")
    (folder / "params" / "head" / "0.0").symlink_to("../../blobs/1")
    same(numbers(folder), expected)


@pytest.mark.parametrize("form", ["decodax", "plain", "zarr3"])
def test_chunks_of_a_wrong_size(folder_of, form):
    folder = folder_of(form)
    (file,) = (file for file in (folder / "params" / "head").rglob("*") if file.is_file() and file.name[0] == "0")
    content = file.read_bytes()
    for wrong in (b"", content[:-1], content[: len(content) // 2], content + b"\0" * 70_000, b"\0" * len(content)):
        if wrong.count(0) == len(content) and form == "decodax":
            continue  # these are numbers
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"head/.*(expected|is no intact chunk)|array head cannot be read"):
            numbers(folder)


BOMBED = """
    import resource, sys
    from pathlib import Path
    from decodax.models.checkpoints.reading import open_params
    from decodax.models.configs.hf_config import load_config
    from decodax.models.checkpoints.name_map import full_region

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for folder in map(Path, sys.argv[1:]):
        try:
            opened = open_params(folder, *load_config(folder))
            opened.read(("head",), full_region((67, 30)), opened.dtype(("head",)))
        except ValueError as error:
            print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_chunk_that_decompresses_to_gigabytes_is_refused(folder_of, tmp_path):
    """2 GiB from 65 kB of zstd, 128 MiB from 130 kB of gzip, with a chunk of 8,040 bytes: refused within 100 MB."""
    folder = folder_of("plain")
    (folder / "params" / "head" / "0.0").write_bytes(zstd_runs(2**31))
    other = shutil.copytree(folder, tmp_path / "gzip")
    pieces = [zlib.compressobj(9, wbits=31)]
    packed = b"".join(pieces[0].compress(bytes(2**20)) for _ in range(128)) + pieces[0].flush()
    (other / "params" / "head" / "0.0").write_bytes(packed)
    change(other / "params" / "head" / ".zarray", compressor={"id": "gzip", "level": 1})
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOMBED), str(folder), str(other)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = output.stdout.splitlines()
    assert "head/0.0 is no intact chunk: it decompresses to up to 2,147,483,648 bytes, expected 8,040" in lines[0]
    assert "head/0.0 is no intact chunk: it decompresses to more than 8,040 bytes, expected 8,040" in lines[1]
    assert int(lines[2]) < 100, output.stderr


def test_inner_chunks_of_a_shard_have_an_index(folder_of, expected):
    """Four chunks in one file, each with a size of its own."""
    folder = folder_of("zarr3")
    file = folder / "params" / "blocks_0.mixer.query" / "zarr.json"
    metadata = json.loads(file.read_text())
    shape = metadata["shape"]
    metadata["codecs"][0]["configuration"]["chunk_shape"] = [shape[0] // 2, shape[1] // 2]
    shutil.rmtree(file.parent)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{file.parent}/"}, "metadata": metadata}
    store = tensorstore.open(spec, create=True, open=True).result()
    store.write(expected["blocks_0", "mixer", "query"]).result()
    assert read_v3(json.loads(file.read_text())).inner == (shape[0] // 2, shape[1] // 2)
    same(numbers(folder), expected)
    chunk = file.parent / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[-68:-60] = (2**40).to_bytes(8, "little")
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"query/c/0/0 is no intact chunk: its index says 1,099,"):
        numbers(folder)
