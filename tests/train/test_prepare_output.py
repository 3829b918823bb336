"""Preparing datasets: what may be there already, object stores, failures, and damage that `--verify` finds."""

import re
import shutil

import fsspec
import pytest
from PIL import Image

from helpers import GOLDEN, files_of_at_most, turns
from llava_jax.console import InputError
from llava_jax.locks import LockedFile
from train import mixture
from train.datasets.prepare import __main__ as preparing
from train.datasets.prepare import image_shards
from train.encoding import Encoder
from train.loader import open_data
from train.samples import Sample, Samples
from training import assert_same_batches, good_row, take

CHECKPOINT = GOLDEN / "checkpoints" / "v1.5-llama"


@pytest.fixture
def data(write):
    return write([good_row(i) for i in range(12)])


def refused(found) -> str:
    """The one line of an error."""
    status, err = found
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---------------------------------------------------------------- the output directory


def test_other_files_stay(tmp_path, data, prepare, in_process):
    out = tmp_path / "out"
    for name, says in [
        ("notes.txt", "holds notes.txt, which is not part of a prepared dataset"),
        ("images/a.png", "holds images, which is not part of a prepared dataset"),
        ("images-00000.tar", "holds parts of a prepared dataset, but neither dataset.json nor prepare.json"),
        ("dataset.json", "its dataset.json is not one that this command has written"),
        ("prepare.json", "its prepare.json is not one that this command has written"),
    ]:
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        assert says in refused(prepare("--data", data))
        assert [path.read_text() for path in out.rglob("*") if path.is_file()] == ["mine"]
        shutil.rmtree(out)
    out.write_text("mine")
    assert "is not a directory" in refused(prepare("--data", data))
    assert "file:// is not a supported object store" in refused(prepare("--data", data, output=f"file://{out}"))


def test_flags_that_do_not_fit(tmp_path, data, prepare):
    assert "--data is needed to prepare a dataset; --checkpoint or --verify" in refused(prepare())
    assert "--template: is for measuring, which needs --checkpoint" in refused(
        prepare("--data", data, "--template", "v1")
    )
    assert "it has no dataset.json" in refused(prepare("--verify"))
    assert "it has no dataset.json" in refused(prepare("--verify", output="nowhere"))
    assert "is not a data file" in refused(prepare("--data", tmp_path))
    assert "--max-shard-size" in refused(prepare("--data", data, "--max-shard-size", "1XB"))


def interrupt_after(monkeypatch, shards: int) -> None:
    """Ctrl-C after so many shards of images."""
    write = image_shards.write_shard

    def interrupted(job, report):
        if job.number == shards:
            raise KeyboardInterrupt
        write(job, report)

    monkeypatch.setattr("train.datasets.prepare.__main__.write_shard", interrupted)


def test_no_output_is_not_the_root_directory(data, run_cli):
    status, _, err = run_cli(preparing.main, "--data", data, "--output", "")
    assert (status, err) == (1, "error: the name of the directory is empty\n")


def test_an_interrupted_command_is_resumed(tmp_path, folder, data, prepare, in_process, monkeypatch):
    assert prepare("--data", data, "--max-shard-size", "20KB", output="whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        status, err = prepare("--data", data, "--max-shard-size", "20KB")
    assert (status, err) == (130, "interrupted\n")
    out = tmp_path / "out"
    begun = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(begun) == [
        "images-00000.part.safetensors", "images-00000.tar", "images-00001.part.safetensors", "images-00001.tar",
        "prepare.json",
    ]  # fmt: skip
    assert "its preparation is not complete; repeat the command" in refused(prepare("--verify"))
    for flags, says in [
        (["--seed", "1"], "with other settings: --seed (0, now 1)"),
        (["--max-side", "100"], "with other settings: --max-side (None, now 100)"),
        (["--data", data], "with other settings: the data files differ"),
    ]:
        assert says in refused(prepare("--data", data, "--max-shard-size", "20KB", *flags))
    before = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(before + b"more")
    assert "with other settings: the images" in refused(prepare("--data", data, "--max-shard-size", "20KB"))
    (folder / "0.png").write_bytes(before)
    (out / "images-00004.tar.incomplete").write_text("half")
    (out / "images-00003.tar").write_text("a shard without its part")
    with LockedFile(out / ".lock") as lock:
        lock.sign()
        assert "in use by another command" in refused(prepare("--data", data, "--max-shard-size", "20KB"))
    status, err = prepare("--data", data, "--max-shard-size", "20KB")
    assert status == 0 and "resuming: 2 of " in err
    assert (out / "images-00000.tar").stat().st_mtime_ns == begun["images-00000.tar"]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_full_disk(tmp_path, data, prepare, in_process):
    with files_of_at_most(10_000):
        err = refused(prepare("--data", data))
    assert err.endswith("images-00000.tar.incomplete: File too large\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prepare.json"]
    assert prepare("--data", data, "--verify")[0] == 0


def test_workers_report_errors(tmp_path, data, prepare):
    """Of the directory, from their own processes."""
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(prepare("--data", data, output="file/out"))


# ---------------------------------------------------------------- object stores


def test_a_bucket(tmp_path, folder, data, prepare, bucket, config, models):
    """The same files as in a directory, and the same batches from them."""
    flags = ["--data", data, "--max-shard-size", "20KB"]
    assert prepare(*flags)[0] == 0
    status, err = prepare(*flags, output=f"{bucket}/a/b")
    assert status == 0, err
    assert f"{bucket}/a/b: 12 conversations (0 left out) and 11 images" in err
    store = fsspec.filesystem("gs")
    found = {path.rpartition("/")[2]: store.cat_file(path) for path in store.find(f"{bucket}/a/b")}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    expected, got = (take(open_data(config(path), *models["v1.5-llama"]), 4) for path in (data, f"{bucket}/a/b"))
    assert_same_batches(expected, got)
    assert "is complete already" in prepare(*flags, output=f"{bucket}/a/b")[1]
    store.pipe_file(f"{bucket}/c/notes.txt", b"mine")
    assert "holds notes.txt" in refused(prepare("--data", data, output=f"{bucket}/c"))


def test_a_bucket_is_measured(data, prepare, bucket, in_process):
    assert prepare("--data", data, output=f"{bucket}/a")[0] == 0
    status, err = prepare("--checkpoint", CHECKPOINT, "--template", "v1", "--verify", output=f"{bucket}/a")
    assert status == 0 and "12 conversations measured for template v1" in err


def test_a_bucket_that_is_not_there(data, prepare, bucket, in_process):
    assert "cannot be written (" in refused(prepare("--data", data, output="gs://other/a"))


# ---------------------------------------------------------------- damage


TAR, LINES, INDEX = "images-00000.tar", "conversations-00000.jsonl", "index.safetensors"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (TAR, lambda data: flip(data, 600), f"{TAR}: image 0 (byte 512): damaged (another checksum"),
        (TAR, lambda data: flip(data, 3), f"{TAR}: damaged (another SHA-256"),
        (TAR, lambda data: data[:-1], f"{TAR}: has "),
        (TAR, None, f"{TAR}: is missing"),
        (LINES, lambda data: data.replace(b"the", b"she", 1), f"{LINES}: row 1 (byte 118): damaged (another checksum"),
        (LINES, lambda data: flip(data, -1), f"{LINES}: damaged (another SHA-256"),
        (INDEX, lambda data: flip(data, -1), f"{INDEX}: damaged (another checksum"),
        (INDEX, None, f"{INDEX}: no such file"),
        ("dataset.json", lambda data: data[:-9], "dataset.json: not JSON"),
    ],
)
def test_verify_names_what_is_damaged(tmp_path, data, prepare, in_process, file, change, says):
    assert prepare("--data", data)[0] == 0
    path = tmp_path / "out" / file
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    status, err = prepare("--verify")
    assert status == 1 and says in err


def flip(data: bytes, at: int) -> bytes:
    """One byte changed."""
    data = bytearray(data)
    data[at] ^= 1
    return bytes(data)


def test_verify_decodes_images(tmp_path, data, prepare, in_process, monkeypatch):
    """A checksum only tells that an image is as it was written."""
    assert prepare("--data", data)[0] == 0
    monkeypatch.setattr("train.datasets.prepare.verify.open_image", lambda _: Image.new("RGB", (3, 5)))
    status, err = prepare("--verify")
    assert status == 1 and "image 0 (byte 512): has 3x5 pixels; index.safetensors says 20x20" in err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (InputError("not JSON"), "not JSON"),
        ({"conversations": turns("a", "b")}, "has 0 images; index.safetensors says 1"),
        (good_row(0) | {"id": "other"}, "has another id than index.safetensors"),
    ],
)
def test_verify_parses_rows(tmp_path, data, prepare, in_process, monkeypatch, row, says):
    assert prepare("--data", data)[0] == 0
    monkeypatch.setattr("train.datasets.prepare.verify.parse_json", lambda *_, **__: row)
    status, err = prepare("--verify")
    assert status == 1 and f"{LINES}: row 0 (byte 0): {says}" in err


def test_verify_checks_lengths(tmp_path, data, prepare, in_process):
    assert prepare("--data", data, "--checkpoint", CHECKPOINT, "--template", "v1")[0] == 0
    path = next((tmp_path / "out").glob("lengths-*"))
    path.write_bytes(path.read_bytes()[:-4])
    assert path.name[-24:] in refused(prepare("--verify"))  # the rest may be elided


def test_training_reads_no_damaged_row(tmp_path, folder, data, prepare, in_process, models):
    """Whether its length is known or not; one of other text with the same length is a bad sample."""
    assert prepare("--data", data)[0] == 0
    path = tmp_path / "out" / LINES
    whole = path.read_bytes()
    damaged = whole.replace(b"the", b"she", 1)
    samples = Samples(str(tmp_path / "out"), "", *models["v1.5-llama"], max_length=240)
    path.write_bytes(damaged)
    says = f"{LINES} row 1: damaged (another checksum than in index.safetensors)"
    assert samples.measure(1).reason.endswith(says)
    path.write_bytes(whole)
    assert isinstance(samples.measure(1), Sample)
    found = samples.measure(1)
    path.write_bytes(damaged)
    assert samples.load(found).reason.endswith(says)
    err = refused(prepare("--checkpoint", CHECKPOINT, "--template", "v1"))
    assert f"{LINES}: row 1: damaged" in err


def test_lengths_of_another_tokenizer(tmp_path, data, prepare, in_process, models):
    """Under the name of those that a run looks for."""
    measured = ["--checkpoint", CHECKPOINT, "--template"]
    assert prepare("--data", data, *measured, "v1")[0] == prepare(*measured, "v0")[0] == 0
    one, other = (tmp_path / "out").glob("lengths-*")
    content = one.read_bytes()
    other.write_bytes(content)
    one.unlink()
    for template in ("v0", "v1"):
        says = "safetensors: damaged, or of another dataset, tokenizer or template; remove it"
        if other.name == Encoder(*models["v1.5-llama"], template).lengths_name(1):
            with pytest.raises(InputError, match=re.escape(says)):
                Samples(str(tmp_path / "out"), "", *models["v1.5-llama"], template=template)
            assert says in refused(prepare(*measured, template))


def test_the_digest_is_of_the_contents(tmp_path, folder, prepare, write, in_process):
    """A run does not resume with other text of the same length."""
    for name, answer in (("one", "cat"), ("two", "dog")):
        path = write([good_row(0) | {"conversations": turns("<image>\n?", answer)}])
        assert prepare("--data", path, output=name)[0] == 0
    one, two = (mixture.checksum(mixture.read_parts(str(tmp_path / name))) for name in ("one", "two"))
    assert one != two
