"""Conversion from Hugging Face to Orbax and back keeps every bit, for every family, mesh and file size."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import decodax
from decodax.models.checkpoints import orbax_writing, reading
from decodax.models.checkpoints.convert_target import MANIFEST
from decodax.models.checkpoints.orbax_writing import chunk_regions, chunk_shape
from decodax.models.checkpoints.reading import NonFiniteWeightWarning, StoredWeights
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.models.model import Model
from decodax.models.mtp_head import load_mtp_head
from tests.golden_files import golden_cases, load_golden

LLAMA = load_golden("llama").folder
MTP = Path(__file__).parents[1] / "golden" / "deepseek_v3_mtp"
QUANTISED = {"deepseek_v3_fp8", "gpt_oss_mxfp4"}
# Written by their own programs with a name map that is not the family's first.
OTHER_LAYOUT = {"deepseek_v2_groups", "mixtral", "minimax", "granitemoe", "qwen3_moe_mixed"}
TWO = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
FOUR = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[4:])


def by_rows(mesh, axis):
    return lambda weight, path: NamedSharding(mesh, PartitionSpec(axis if weight.shape[0] % 2 == 0 else None))


def by_columns(mesh, axis):
    def sharding(weight, path):
        last = axis if weight.shape[-1] % 2 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(weight.shape) - 1), last))

    return sharding


def assert_same(one, other):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
        )

    jax.tree.map(same, one, other)


@pytest.fixture
def cut_small(monkeypatch):
    """Chunks of at most 4,000 bytes, so that small weights take many files."""
    monkeypatch.setattr(orbax_writing, "CHUNK_BYTES", 4000)


@pytest.fixture
def shardings(monkeypatch):
    """Lets a test choose the sharding of weights when they are written and when they are read."""

    def use(sharding_of):
        monkeypatch.setattr("decodax.models.checkpoints.write_orbax.shardings_on", lambda mesh, rules: sharding_of)
        monkeypatch.setattr("decodax.models.load.shardings_on", lambda mesh, rules: sharding_of)

    return use


@pytest.mark.parametrize("name", [*golden_cases(), "deepseek_v3_mtp"])
@pytest.mark.quick_cases(8)
def test_there_and_back_for_every_family(tmp_path, name, cut_small, shardings):
    """Sharded by rows when written, by columns over other devices when read, and back from those arrays."""
    source = MTP if name == "deepseek_v3_mtp" else load_golden(name).folder
    expected = decodax.load(source)
    shardings(by_rows(TWO, "tensor"))
    from_hf(source, tmp_path / "orbax")
    shardings(by_columns(FOUR, "y"))
    read = decodax.load(tmp_path / "orbax")
    assert read.config == expected.config
    assert_same(read.params, expected.params)
    restored = orbax.checkpoint.PyTreeCheckpointer().restore(tmp_path / "orbax" / "params")
    restored.pop("mtp_head", None)
    assert_same(restored, jax.tree.map(np.asarray, expected.params))
    to_hf(tmp_path / "orbax", tmp_path / "back")
    to_hf(read, tmp_path / "held")
    for folder in ("back", "held"):
        assert_same(decodax.load(tmp_path / folder).params, expected.params)
    if name in QUANTISED:
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert "quantization_config" not in config
        assert config.get("dtype", config.get("torch_dtype")) == "float32"
    else:
        assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
        first, second = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
        assert_same({n: first[n] for n in first.keys() & second.keys()}, {n: second[n] for n in first.keys() & second})
        if name not in OTHER_LAYOUT:
            copies = {f"model.layers.2.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")}
            assert first.keys() - copies == second.keys()


def test_the_mtp_head_is_converted(tmp_path):
    from_hf(MTP, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    model = Model(decodax.load(MTP).config)
    expected = load_mtp_head(MTP, model, dtype="float32")
    for folder in ("orbax", "back"):
        assert_same(load_mtp_head(tmp_path / folder, model, dtype="float32"), expected)


def test_tensors_that_are_not_read_are_named(tmp_path):
    source = load_golden("qwen3_next").folder
    shutil.copy(source / "config.json", tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensor\(s\) of .* not read by decodax and not converted: mtp.fc.weight"):
        from_hf(tmp_path, tmp_path.with_name("out"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_rounded(tmp_path, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind), decodax.load(LLAMA).params)
    from_hf(LLAMA, tmp_path / "orbax", dtype=dtype)
    to_hf(LLAMA, tmp_path / "hf", dtype=dtype)
    for folder in ("orbax", "hf"):
        assert_same(jax.tree.map(np.asarray, decodax.load(tmp_path / folder, dtype=dtype).params), expected)
        assert json.loads((tmp_path / folder / MANIFEST).read_text())["dtypes"] == [dtype]
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == dtype
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16 or None, got 'int8'"):
        from_hf(LLAMA, tmp_path / "int8", dtype="int8")


@pytest.mark.parametrize("limit", [1, 10_000, 30_000, 10**9])
def test_files_are_no_larger_than_the_limit(tmp_path, limit):
    to_hf(LLAMA, tmp_path / "hf", max_shard_bytes=limit)
    assert_same(decodax.load(tmp_path / "hf").params, decodax.load(LLAMA).params)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10**9)
    names = set()
    for index, file in enumerate(files):
        assert file.name == (
            "model.safetensors" if len(files) == 1 else f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        )
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        names |= tensors.keys()
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers refuses files without
    assert names == load_file(LLAMA / "model.safetensors").keys()
    if len(files) > 1:
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == names
        assert index["metadata"]["total_size"] == decodax.load(LLAMA).nbytes
    with pytest.raises(ValueError, match=r"max_shard_bytes must be at least 1"):
        to_hf(LLAMA, tmp_path / "other", max_shard_bytes=0)


def test_wide_and_narrow_types_side_by_side(tmp_path):
    """Odd counts of bfloat16 before float32, which would then be misaligned."""
    shutil.copy(LLAMA / "config.json", tmp_path)
    tensors = load_file(LLAMA / "model.safetensors")
    kinds = [ml_dtypes.bfloat16, np.float32, np.float16]
    tensors = {name: tensor.astype(kinds[i % 3]) for i, (name, tensor) in enumerate(tensors.items())}
    save_file(tensors, tmp_path / "model.safetensors")
    from_hf(tmp_path, tmp_path.with_name("orbax"))
    to_hf(tmp_path.with_name("orbax"), tmp_path.with_name("back"))
    file = tmp_path.with_name("back") / "model.safetensors"
    assert_same(load_file(file), tensors)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + size]).items():
        assert name == "__metadata__" or (8 + size + entry["data_offsets"][0]) % tensors[name].itemsize == 0


def test_nonfinite_numbers_are_converted_and_named(tmp_path):
    source = Path(shutil.copytree(LLAMA, tmp_path / "source"))
    tensors = load_file(LLAMA / "model.safetensors")
    bits = tensors["model.norm.weight"].view(np.uint32)
    bits[:3] = 0x7FC01234, 0xFF800000, 0x7F800001  # NaN with a message, -infinity, a signalling NaN
    save_file(tensors, source / "model.safetensors")
    with pytest.warns(NonFiniteWeightWarning, match=r"in 1 weight\(s\) of .*source: model.norm.weight"):
        from_hf(source, tmp_path / "orbax")
    with pytest.warns(NonFiniteWeightWarning, match=r"orbax: final_norm.weight"):
        to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_files_beside_the_weights_are_copied(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(LLAMA, source)
    beside = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x", "merges.txt": "a b"}
    beside["generation_config.json"] = '{"eos_token_id": [5, 7]}'
    for name, content in beside.items():
        (source / name).write_text(content)
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "notes.txt").write_text("mine")
    from_hf(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    for folder in ("orbax", "back"):
        names = {file.name for file in (tmp_path / folder).iterdir()}
        assert names - {"params", "model.safetensors"} == {*beside, "config.json", MANIFEST}
        assert {name: (tmp_path / folder / name).read_text() for name in beside} == beside


def test_the_manifest(tmp_path):
    done = from_hf(LLAMA, tmp_path / "orbax", dtype="bfloat16")
    manifest = json.loads((tmp_path / "orbax" / MANIFEST).read_text())
    lm = decodax.load(LLAMA)
    assert manifest == done.manifest and done.resumed_bytes == 0
    assert manifest["form"] == "orbax" and manifest["written_by"] == f"decodax {decodax.__version__}"
    assert manifest["num_parameters"] == lm.nbytes // 4 and manifest["num_bytes"] == lm.nbytes // 2
    status = (LLAMA / "model.safetensors").stat()
    stamp = {"num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    assert manifest["source"] == {"name": "llama", "files": {"model.safetensors": stamp}}
    files = json.loads((to_hf(tmp_path / "orbax", tmp_path / "back").target / MANIFEST).read_text())["source"]["files"]
    assert (
        sum(stamp["num_bytes"] for name, stamp in files.items() if "/." not in name)
        == lm.nbytes // 2 + files["params/_METADATA"]["num_bytes"]
    )


def test_a_second_run_does_nothing(tmp_path, monkeypatch):
    def refuse(self, path, region, dtype):
        raise AssertionError("read again")

    from_hf(LLAMA, tmp_path / "orbax")
    monkeypatch.setattr(StoredWeights, "read", refuse)
    num_bytes = sum(tensor.nbytes for tensor in load_file(LLAMA / "model.safetensors").values())
    assert from_hf(LLAMA, tmp_path / "orbax").resumed_bytes == num_bytes
    with pytest.raises(AssertionError, match=r"read again"):
        from_hf(LLAMA, tmp_path / "orbax", dtype="bfloat16", overwrite=True)


def test_a_changed_source_is_another_conversion(tmp_path):
    source = Path(shutil.copytree(LLAMA, tmp_path / "source"))
    from_hf(source, tmp_path / "orbax")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"orbax is there already: .* pass overwrite=True \(--overwrite on the"):
        from_hf(source, tmp_path / "orbax")
    from_hf(source, tmp_path / "orbax", overwrite=True)
    assert_same(decodax.load(tmp_path / "orbax").params, decodax.load(source).params)


def test_a_model_that_was_changed_is_refused(tmp_path):
    lm = decodax.load(LLAMA)
    lm.params["extra"] = lm.params["embedding"]
    with pytest.raises(ValueError, match=r"the model is no longer the one that .*llama describes"):
        to_hf(lm, tmp_path / "out")


def test_damaged_orbax_folders(tmp_path):
    def damaged():
        shutil.rmtree(tmp_path / "orbax", ignore_errors=True)
        from_hf(LLAMA, tmp_path / "orbax")
        return tmp_path / "orbax" / "params"

    shutil.rmtree(damaged() / "final_norm.weight")
    with pytest.raises(ValueError, match=r"params holds no array final_norm.weight that can be read"):
        decodax.load(tmp_path / "orbax")
    params = orbax.checkpoint.PyTreeCheckpointer().restore(damaged())
    shutil.rmtree(tmp_path / "orbax" / "params")
    params["more"], params["head"] = np.ones(3, np.float32), params["head"][1:]
    params["final_norm"] = {"weight": np.ones(30, np.int32)}
    del params["blocks_0"]["mixer"]["key"]
    orbax.checkpoint.PyTreeCheckpointer().save(tmp_path / "orbax" / "params", params)
    with pytest.raises(ValueError) as caught:
        decodax.load(tmp_path / "orbax")
    lines = str(caught.value).split("\n  - ")[1:]
    assert sorted(lines) == [
        "misshapen: head [66, 30], expected [67, 30]",
        "missing: blocks_0.mixer.key [16, 30]",
        "surplus: more [3]",
        "unknown kind of number: final_norm.weight is int32, expected one of ['BF16', 'F16', 'F32', 'F64'], or a "
        "weight format that config.json names",
    ]
    (tmp_path / "orbax" / "params" / "_METADATA").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        decodax.load(tmp_path / "orbax")


def test_weights_of_zeros_are_stored(tmp_path):
    shutil.copytree(LLAMA, tmp_path / "source")
    tensors = load_file(LLAMA / "model.safetensors")
    zeros = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    zeros["model.norm.weight"][3] = -0.0  # equal to zero, and another number
    save_file(zeros, tmp_path / "source" / "model.safetensors")
    from_hf(tmp_path / "source", tmp_path / "orbax")
    files = [file for file in (tmp_path / "orbax" / "params").glob("*/*") if not file.name.startswith(".")]
    assert sum(file.stat().st_size for file in files) == sum(tensor.nbytes for tensor in zeros.values())
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), zeros)


def test_chunks_cover_every_array_once(monkeypatch):
    monkeypatch.setattr(orbax_writing, "CHUNK_BYTES", 60)
    for shape, shard in (
        ((), None),
        ((7,), None),
        ((31,), None),
        ((13, 5), None),
        ((8, 12), (8, 3)),
        ((6, 4, 9), (3, 4, 9)),
    ):
        chunk = chunk_shape(shape, 4, shard)
        assert 4 * np.prod(chunk, dtype=int) <= 60, (shape, chunk)
        if shard is not None:
            assert all(size % step == 0 for size, step in zip(shard, chunk, strict=True))
        seen = np.zeros(shape, int)
        names = [seen.__setitem__(region, seen[region] + 1) or name for name, region in chunk_regions(shape, chunk)]
        assert (seen == 1).all() and len(set(names)) == len(names)


def test_a_checkpoint_of_a_former_version_is_converted_again(tmp_path, monkeypatch):
    from_hf(load_golden("qwen3_next").folder, tmp_path / "orbax")
    stored = reading.source_of(tmp_path / "orbax").tensors()
    former = {name.replace("mixer.query", "mixer.query_key_value_gate"): entry for name, entry in stored.items()}
    monkeypatch.setattr(reading, "_open", lambda source, raw: former)
    with pytest.raises(ValueError, match=r"convert the model's own folder again \(decodax convert FOLDER -o .*orbax"):
        decodax.load(tmp_path / "orbax")
