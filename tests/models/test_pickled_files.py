"""Weights that torch.save stored are read as PyTorch reads them; a pickle that would run something is refused."""

import builtins
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import decodax
from decodax.models.checkpoints.model_weights import model_weight_files, open_model_weights
from decodax.models.checkpoints.pickled_files import open_pickled
from decodax.models.checkpoints.restricted_pickle import read_state
from decodax.models.checkpoints.safetensors_files import RawTensor
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.configs.hf_config import load_config

GOLDEN = Path(__file__).parent.parent / "golden_pickled"
SINGLE = GOLDEN / "single"


def numbers_of(folder):
    with np.load(folder / "numbers.npz") as file:
        return dict(file)


def by_name(folder):
    family, config = load_config(folder)
    params = decodax.load(folder, dtype="float32").params
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {name: np.asarray(leaves[path]) for name, path in family.tensor_names(config).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["single", "shards"])
def test_the_numbers_are_those_of_pytorch(name):
    assert "torch" not in sys.modules
    assert_same(by_name(GOLDEN / name), numbers_of(GOLDEN / name))
    assert "torch" not in sys.modules


def test_numbers_out_of_order_are_read_from_the_file():
    stored = open_pickled(SINGLE / "pytorch_model.bin")
    wanted = numbers_of(SINGLE)
    for name in ("mlp.down_proj", "self_attn.k_proj", "input_layernorm"):
        tensor, full = stored[f"model.layers.0.{name}.weight"], wanted[f"model.layers.0.{name}.weight"]
        np.testing.assert_array_equal(tensor.rows(slice(0, 15, 2)), np.atleast_2d(full)[0:15:2])
        np.testing.assert_array_equal(tensor.rows(np.array([0])), np.atleast_2d(full)[[0]])
    assert {mapping for tensor in stored.values() for mapping in tensor.mappings} == {stored["lm_head.weight"].mapping}


def test_safetensors_files_win(tmp_path):
    shutil.copytree(SINGLE, tmp_path, dirs_exist_ok=True)
    numbers = {name: np.full_like(value, 3) for name, value in numbers_of(SINGLE).items()}
    save_file(numbers, tmp_path / "model.safetensors")
    assert_same(by_name(tmp_path), numbers)
    assert model_weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert model_weight_files(SINGLE) == [SINGLE / "pytorch_model.bin"]


def test_conversion_writes_safetensors(tmp_path):
    to_hf(SINGLE, tmp_path / "written")
    assert_same(by_name(tmp_path / "written"), numbers_of(SINGLE))


def test_indexes_that_do_not_fit_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "shards", tmp_path, dirs_exist_ok=True)
    index, second = tmp_path / "pytorch_model.bin.index.json", tmp_path / "pytorch_model-00002-of-00002.bin"
    (tmp_path / "first.bin").write_bytes((tmp_path / "pytorch_model-00001-of-00002.bin").read_bytes())
    index.write_text(json.dumps({"weight_map": {"a": "first.bin", "b": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(ValueError, match=r"is in .*00001-of-00002.bin and in another file"):
        open_model_weights(tmp_path)
    for name in ("../x.bin", "x.safetensors", ".bin", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=r"must name files in its own folder that end in .bin"):
            open_model_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": second.name}}))
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not in .*00002-of-00002.bin"):
        open_model_weights(tmp_path)


def test_the_form_before_pytorch_1_6_is_refused():
    with pytest.raises(ValueError, match=r"legacy.bin .*no zip archive.*convert it once with transformers"):
        open_pickled(GOLDEN / "legacy.bin")


class Called:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Called(os.system, "touch was-here"), r"names (posix|nt)\.system"),
        (Called(builtins.eval, "1"), r"names (builtins|__builtin__)\.eval"),
        ({"a": Called(builtins.getattr, OrderedDict(), "clear")}, r"names (builtins|__builtin__)\.getattr"),
        (Called(OrderedDict, [("a", Called(builtins.exec, "1"))]), r"names (builtins|__builtin__)\.exec"),
        (Called(OrderedDict.fromkeys, ["a"]), r"names (builtins|__builtin__)\.getattr"),
        ({"a": slice(3)}, r"names (builtins|__builtin__)\.slice"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_functions_are_named_and_not_called(tmp_path, monkeypatch, value, named, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        read_state(pickle.dumps(value, protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", r"names os\.system"),  # text instructions of protocol 0
        (b"(dI1\nI2\ns.", "instruction DICT"),
        (b"\x80\x02}2.", "instruction DUP"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "no function of a state dictionary"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "describes a tensor in an unknown way"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "describes a parameter in an unknown way"),
        (b"\x80\x02ctorch\nFloatStorage\nQ.", "describes a storage in an unknown way"),
        (b"\x80\x02K\x01.", "no state dictionary"),
        (b"\x80\x02}K\x01K\x02s.", "keys that are no texts"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x02s.", "'a' in it is no tensor"),
        (b"\x80\x02K\x01}b.", "sets attributes"),
        (b"\x80\x02h\x07.", "damaged"),  # a memo that was never filled
        (b"\x80\x02.", "no state dictionary"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"", "damaged|exhausted|no state dictionary"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected 2147483647 bytes"),  # a text of 2 GiB
        (b"\x80\x04\x8d" + b"\xff" * 8 + b"a.", "."),  # one of 2^64 bytes
        (b"\x80\x02\x8b\xff\xff\xff\x7fa.", "."),  # a number of 2 GiB
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "more than 64 bits"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # 2^32 - 1 as the place in the memo: an array would have 32 GiB
    ],
)
def test_pickles_that_are_no_state_dictionary_are_refused(content, problem):
    if problem is None:
        assert read_state(content) == {}
        return
    with pytest.raises(ValueError, match=problem):
        read_state(content)


def test_an_object_used_many_times_exists_once():
    """A billion laughs: 60 tuples, each of which holds the one before it twice."""
    content = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
    with pytest.raises(ValueError, match="no state dictionary"):
        read_state(content)


def torch_modules(monkeypatch):
    """Modules of PyTorch's names, so that Python can pickle references to them."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch", "__qualname__": "FloatStorage"})

    def rebuild(*arguments):
        raise AssertionError("nothing is called")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch.FloatStorage, rebuild


@pytest.fixture
def pickled(monkeypatch):
    """A function that pickles a tensor "x" of a storage "0" of 12 numbers."""
    storage, rebuild = torch_modules(monkeypatch)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj[1:] if isinstance(obj, tuple) and obj[:1] == ("persistent",) else None

    def dump(shape=(3, 4), strides=(4, 1), offset=0, count=12, key="0"):
        described = ("persistent", "storage", storage, key, "cpu", count)
        stream = io.BytesIO()
        Pickler(stream, 2).dump({"x": Called(rebuild, described, offset, shape, strides, False, OrderedDict())})
        return stream.getvalue()

    return dump


def archive(path, *files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as written:
        for name, content in files:
            written.writestr(name, content)
    return path


STORAGE = np.arange(12, dtype=np.float32).tobytes()


def test_a_tensor_made_by_hand_is_read(tmp_path, pickled):
    file = archive(tmp_path / "x.bin", ("m/data.pkl", pickled((2, 3), (1, 4), 1)), ("m/data/0", STORAGE))
    np.testing.assert_array_equal(open_pickled(file)["x"].rows(slice(0, 2)), [[1, 5, 9], [2, 6, 10]])
    file = archive(tmp_path / "y.bin", ("m/data.pkl", pickled((1, 3, 1), (7, 1, 5))), ("m/data/0", STORAGE))
    assert type(open_pickled(file)["x"]) is RawTensor  # in order, whatever the strides of axes of size 1
    file = archive(tmp_path / "z.bin", ("m/data.pkl", pickled((2, 3, 2), (1, 2, 6))), ("m/data/0", STORAGE))
    stacked = [[0, 6], [2, 8], [4, 10], [1, 7], [3, 9], [5, 11]]
    np.testing.assert_array_equal(open_pickled(file)["x"].rows(slice(1, 5)), stacked[1:5])


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        ({"shape": (4, 4)}, r"\[4, 4\] that ends after the 12 numbers"),
        ({"offset": 1}, "ends after the 12 numbers"),
        ({"strides": (2**40, 1)}, "ends after the 12 numbers"),
        ({"strides": (-4, 1)}, "in an unknown way"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "ends after"),
        ({"shape": (True, 4)}, "in an unknown way"),
        ({"shape": (12,)}, "in an unknown way"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "its pickle describes a tensor in an unknown way"),
        ({"count": 2**61}, r"has 48 bytes, expected 9,223,372,036,854,775,808"),
        ({"count": 11, "shape": (2, 4)}, "has 48 bytes, expected 44"),
        ({"key": "1"}, "is not there"),
        ({"key": "../0"}, "is not there"),
    ],
)
def test_tensors_that_their_storage_does_not_hold_are_refused(tmp_path, pickled, described, problem):
    file = archive(tmp_path / "x.bin", ("m/data.pkl", pickled(**described)), ("m/data/0", STORAGE))
    with pytest.raises(ValueError, match=problem):
        open_pickled(file)


def test_axes_that_repeat_one_number_take_no_memory(tmp_path, pickled):
    described = pickled((2**30, 2**30), (0, 0))
    tensor = open_pickled(archive(tmp_path / "x.bin", ("m/data.pkl", described), ("m/data/0", STORAGE)))["x"]
    assert tensor.shape == (2**30, 2**30)


def test_archives_that_torch_does_not_write_are_refused(tmp_path, pickled):
    state, data, file = ("m/data.pkl", pickled()), ("m/data/0", STORAGE), tmp_path / "x.bin"

    def refused(problem):
        with pytest.raises(ValueError, match=rf"x.bin .*{problem}"):
            open_pickled(file)

    archive(file, state, data, compression=zipfile.ZIP_DEFLATED)
    refused("m/data.pkl in its archive is compressed")
    archive(file, state, data, ("m/byteorder", b"big"))
    refused("byteorder is not little")
    archive(file, state, data, ("m/constants.pkl", b"x"))
    refused("TorchScript")
    archive(file, state, data, ("n/data.pkl", b"x"))
    refused("2 files data.pkl")
    archive(file, data)
    refused("0 files data.pkl")
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(file, state, data, data)
    refused("a name comes twice")
    archive(file, ("../../m/data.pkl", pickled()), ("../../m/data/0", STORAGE))  # nothing is extracted
    assert open_pickled(file)["x"].shape == (3, 4)


def directory_entries(content):
    """Where the entries of the archive's directory start."""
    places, start = [], content.find(b"PK\1\2")
    while start >= 0:
        places.append(start)
        start = content.find(b"PK\1\2", start + 4)
    return places


@pytest.mark.parametrize("damage", ["overlap", "beyond", "local header", "size", "last size", "cut"])
def test_damaged_archives_are_refused(tmp_path, pickled, damage):
    file = archive(tmp_path / "x.bin", ("m/data.pkl", pickled()), ("m/data/0", STORAGE), ("m/data/1", STORAGE))
    content = bytearray(file.read_bytes())
    _, first, second = directory_entries(content)
    header = struct.unpack_from("<I", content, first + 42)[0]
    if damage == "overlap":
        struct.pack_into("<I", content, second + 42, header)
    elif damage == "beyond":
        struct.pack_into("<I", content, second + 42, 2**31)
    elif damage == "local header":
        content[header] ^= 1
    elif damage.endswith("size"):
        struct.pack_into("<II", content, (first if damage == "size" else second) + 20, 2**31, 2**31)
    else:
        del content[-5:]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.bin .*: .*download the file again|x.bin .*no zip archive"):
        open_pickled(file)


def test_a_pickle_of_absurd_size_is_not_read(tmp_path, monkeypatch, pickled):
    monkeypatch.setattr("decodax.models.checkpoints.pickled_files._MAX_PICKLE_BYTES", 7)
    file = archive(tmp_path / "x.bin", ("m/data.pkl", pickled()), ("m/data/0", STORAGE))
    with pytest.raises(ValueError, match="more than 7 are not read"):
        open_pickled(file)


def test_a_pickle_of_endless_instructions_is_not_read(monkeypatch):
    monkeypatch.setattr("decodax.models.checkpoints.restricted_pickle._MAX_INSTRUCTIONS", 11)
    with pytest.raises(ValueError, match="more than 11 instructions"):
        read_state(b"\x80\x02" + b"}" * 11 + b".")
    with pytest.raises(ValueError, match="no state dictionary"):
        read_state(b"\x80\x02" + b"}" * 10 + b".")
