"""The reader of torch's files: it gives what torch saved, runs nothing, and is done soon."""

import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import read_damaged
from llava_jax.checkpoints import torch_files
from llava_jax.console import InputError


def test_torch_files_hold_what_torch_saved(tmp_path):
    tensors = {
        "plain": torch.randn(3, 4), "turned": torch.randn(5, 6).T, "scalar": torch.tensor(3.5),
        "slice": torch.randn(10, dtype=torch.bfloat16)[3:7], "parameter": torch.nn.Parameter(torch.randn(2, 2).half()),
        "whole numbers": torch.arange(5), "bytes": torch.arange(7, dtype=torch.uint8), "nothing": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]), "doubles": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    for contents in (tensors, {"state_dict": tensors, "step": 3}):
        torch.save(contents, tmp_path / "file.bin")
        file = torch_files.File(tmp_path / "file.bin")
        assert file.tensors.keys() == tensors.keys()
        for name, x in tensors.items():
            x = x.detach()
            want = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
            np.testing.assert_array_equal(file.read(name).astype(want.dtype), want)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "file.bin")  # with its `_metadata`
    assert torch_files.File(tmp_path / "file.bin").tensors.keys() == {"weight", "bias"}


class Evil:
    def __init__(self, callee, *arguments):
        self.reduced = callee, arguments

    def __reduce__(self):
        return self.reduced


def test_nothing_in_a_pickle_is_run(tmp_path):
    target = tmp_path / "touched"
    for callee, says in ((os.system, "posix.system"), (eval, "__builtin__.eval"), (open, "io.open")):
        arguments = (f"touch {target}",) if callee is os.system else (str(target), "w") if callee is open else ("1",)
        torch.save({"a": Evil(callee, *arguments)}, tmp_path / "evil.bin")
        with pytest.raises(InputError, match=f"refused: its pickle asks for {says}"):
            torch_files.File(tmp_path / "evil.bin")
    assert not target.exists()


def test_older_formats_say_how_to_go_on(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before torch 1\.6; .*torch\.save"):
        torch_files.File(tmp_path / "old.bin")
    for data in (pickle.dumps({"a": 1}), b"GIF89a", b""):
        (tmp_path / "other.bin").write_bytes(data)
        with pytest.raises(InputError, match=r"bare pickle|not a file of torch"):
            torch_files.File(tmp_path / "other.bin")


def with_pickle(path: Path, program: bytes, **entries: bytes) -> Path:
    """A file of torch's whose pickle is another."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": program, "data/0": b"\0" * 16, **entries}.items():
            archive.writestr(f"archive/{name}", data)
    return path


PAIRS = b")" + b"q\x00h\x00\x86" * 60  # a tuple of itself and itself, 60 times over
BOMBS = {
    "deep key": b"})" + b"\x85" * 200_000 + b"K\x01s.",
    "wide key": b"}" + PAIRS + b"K\x01s.",
    "numbers that hash alike": b"}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 30_000)) + b"u.",
    "wide name": PAIRS + b"q\x01h\x01\x93.",
    "many arguments": b"ctorch._utils\n_rebuild_parameter\nq\x00(" + b"K\x01" * 30_000 + b"tq\x01"
    + b"h\x00h\x01R0" * 30_000 + b".",
    "many lists": b"]" * 3_000_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS)
def test_pickles_that_would_take_for_ever(tmp_path, program):
    begun = time.monotonic()
    with pytest.raises(InputError):
        torch_files.File(with_pickle(tmp_path / "bomb.bin", b"\x80\x02" + program))
    assert time.monotonic() - begun < 60  # each of these took minutes, or the interpreter's life


def test_archives_that_lie(tmp_path):
    torch.save({"a": torch.randn(4), "b": torch.randn(4)}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", data)]
    offsets = {data[e + 46 : e + 46 + int.from_bytes(data[e + 28 : e + 30], "little")]: e + 42 for e in entries}
    first, second = (offsets[name] for name in sorted(offsets) if name.endswith((b"data/0", b"data/1")))
    (tmp_path / "lies.bin").write_bytes(data[:second] + data[first : first + 4] + data[second + 4 :])
    with pytest.raises(InputError, match="overlap"):
        torch_files.File(tmp_path / "lies.bin")
    with pytest.raises(InputError, match="big-endian"):
        torch_files.File(with_pickle(tmp_path / "order.bin", b"}.", byteorder=b"big"))
    torch.save({"a": torch._neg_view(torch.randn(3))}, tmp_path / "negated.bin")
    with pytest.raises(InputError, match="save a clone"):
        torch_files.File(tmp_path / "negated.bin")


def test_damaged_torch_files_are_refused_or_read(tmp_path):
    torch.save({"a": torch.randn(3, 4), "b": torch.randn(9)[2:5], "c": torch.arange(6)}, tmp_path / "whole.bin")
    read, refused = read_damaged(torch_files.File, tmp_path / "whole.bin")
    assert read > 100 and refused > 100
