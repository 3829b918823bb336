"""Files of tensors: safetensors and what torch.save writes, whole, broken, or made by strangers."""

import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from llava_jax.checkpoints import safetensors_files, torch_files
from llava_jax.console import InputError

# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_safetensors_are_read_as_the_library_writes_them(tmp_path, dtype):
    from safetensors.numpy import save_file

    tensors = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.array(1, dtype),
        "none": np.zeros((0, 3), dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = safetensors_files.File(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(got, x)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated, or not a safetensors"),
        (b"PK\x03\x04junkjunkjunk", "truncated, or not a safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", "truncated, or not a safetensors"),
        (struct.pack("<Q", 9) + b"{nonsense", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 20000) + b"[" * 20000, "not JSON"),
        (header({"a": F32}, b"1234"), "truncated: tensor 'a' ends at byte"),
        (header({"a": F32}, b"12345678extra"), "5 bytes after the last tensor"),
        (header({"a": F32, "b": F32}, b"12345678"), "'a' and 'b' overlap"),
        (header({"a": F32 | {"data_offsets": [4, 12]}}, b"1" * 12), "4 bytes before tensor 'a'"),
        (header({"a": F32 | {"shape": [3]}}, b"12345678"), "needs 12 bytes, but its offsets give 8"),
        (header({"a": F32 | {"dtype": "F128"}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [-2]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"data_offsets": [8, 0]}}, b"12345678"), "needs 8 bytes"),
        (header({"a": {"dtype": "F32"}}, b"12345678"), "broken header entry"),
        (header({"a": 7}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"dtype": ["F32"]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": "22"}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"data_offsets": [0, 8, 8]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [1] * 16 + [2]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [2**40] * 200_000}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}), "broken header entry"),
        (header({"a" * 1001: F32}, b"12345678"), "broken header entry"),
        (header({"a" * 1000: F32, "b": F32}, b"12345678"), "overlap"),
        (header({"a": F32, "c": F32}, b"12345678").replace(b'"c"', b'"a"'), "a key twice"),
        (header({"a": F32 | {"shape": [2], "sh": [3]}}, b"12345678").replace(b'"sh"', b'"shape"'), "not JSON"),
        (header({"__metadata__": [1], "a": F32}, b"12345678"), "not a JSON object"),
        (struct.pack("<Q", 2**24 + 1) + b" " * 2**24 + b"{}", "truncated, or not a safetensors"),
    ],
)
def test_broken_safetensors(tmp_path, data, says):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says) as error:
        safetensors_files.File(path)
    assert "m.safetensors" in str(error.value) and len(str(error.value)) < 300


# ---------------------------------------------------------------- what torch.save writes, by hand


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def tensor(
    *, storage: str = "FloatStorage", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85", more=b""
) -> bytes:
    """A tensor of four numbers in storage 0, in the instructions of a pickle."""
    place = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text("0") + text("cpu") + b"K\x04tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"K\x00" + shape + strides + b"\x89N" + more + b"tR"


def torch_file(path, pickle: bytes, compression: int = zipfile.ZIP_STORED, entries: int = 1):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle + b".", compression)
        for i in range(entries):
            archive.writestr(f"a/data/{i}", np.arange(4, dtype=np.float32).tobytes())
    return path


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


DOUBLED = b"U\x01a" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))  # a tuple of 2**60 texts
SIDE = b"\x8a\x06" + b"\xff" * 5 + b"\x00"  # 2**40 - 1
MANY = b"".join(text(str(i)) + b"h\x00" for i in range(30_000))


@pytest.mark.parametrize(
    ("pickle", "says"),
    [
        (dictionary(w=tensor(more=DOUBLED)), "a conjugate or negative view"),
        (dictionary(w=tensor(shape=DOUBLED)), "layout does not consist of integers"),
        (dictionary(w=tensor(strides=DOUBLED)), "layout does not consist of integers"),
        (DOUBLED + b"K\x01\x93", "a global whose name is not a string"),
        (b"}" + DOUBLED + b"Ns", "keys are neither strings nor small integers"),
        (b"(" + DOUBLED + DOUBLED + DOUBLED + DOUBLED + b"K\x04tQ", "a storage without a name"),
        (b"(" + DOUBLED + b"N" + text("0") + b"NK\x04tQ", "not a tensor's storage"),
        (b"}K\x07" + tensor() + b"s", "names are numbers"),
        (dictionary(w=tensor(shape=b"(K\x00" + SIDE + SIDE + b"t", strides=b"K\x00K\x00K\x00\x87")), "broken layout"),
        (dictionary(w=tensor(storage="x" * 10_000 + "Storage")), "which are not supported"),
        (dictionary(**{"w" * 1000: tensor(shape=b"K\x09\x85")}), "has more elements than its storage"),
        (b"c" + b"x" * 10_000 + b"\ny\n", "refused: its pickle asks for xxx"),
        (b"]0" * 600_000, "its pickle is too long"),
        (b"I" + b"9" * 2_000_000 + b"\n", "truncated or broken"),
        (b"\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6, "instruction LONG4"),
        (b"l", "instruction LIST"),
    ],
)  # fmt: skip
def test_pickles_of_strangers_are_refused_at_once(tmp_path, pickle, says):
    with pytest.raises(InputError, match=says) as error:
        torch_files.File(torch_file(tmp_path / "m.bin", pickle))
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_one_dictionary_under_many_names_is_gone_through_once(tmp_path):
    """And not 30,000 times 30,000 items."""
    inner = b"}q\x00(" + MANY + b"u"
    assert not torch_files.File(torch_file(tmp_path / "m.bin", b"}(" + text("d") + inner + MANY + b"u")).tensors


def test_archives_of_strangers_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="data.pkl is compressed"):
        torch_files.File(torch_file(tmp_path / "m.bin", b"]0" * 10**6, zipfile.ZIP_DEFLATED))
    path = torch_file(tmp_path / "m.bin", dictionary(w=tensor()), entries=1000)
    assert torch_files.File(path).read("w").tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(torch_files, "MAX_ARCHIVE", 10_000)
    with pytest.raises(InputError, match="too many entries"):
        torch_files.File(path)
