"""Data and runs that the tests of training share."""

import json
import shutil

import fsspec
import gcsfs
import numpy as np
import pytest
from gcp_storage_emulator.server import create_server
from PIL import Image

from helpers import GOLDEN, turns
from llava_jax.checkpoints.checkpoint import open_checkpoint
from train import __main__ as command
from train import loop
from train.config import TrainConfig
from train.datasets.prepare import __main__ as preparing
from train.run import prepare
from training import flags, mesh_of_one, write_rows

# ---------------------------------------------------------------- data

SIZES = [(20, 20), (40, 20), (20, 50), (56, 56), (90, 30), (30, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images 0.png ... 11.png, all different, and broken ones."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        width, height = SIZES[i % len(SIZES)]
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    whole = (folder / "3.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.open(folder / "3.png").save(folder / "truncated.jpg")  # unlike that of a PNG, its header stands alone
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 600)).save(folder / "thin.png")
    (folder / "directory.png").mkdir()
    return folder


@pytest.fixture(scope="module")
def models():
    """Of two golden checkpoints: (configuration, tokenizer)."""
    found = {name: open_checkpoint(GOLDEN / "checkpoints" / name) for name in ("v1.5-llama", "v1.6-mistral")}
    return {name: (one.config, one.tokenizer) for name, one in found.items()}


@pytest.fixture
def write(tmp_path):
    """Write a data file: its path."""
    return lambda rows, name="data.json": write_rows(tmp_path / name, rows)


@pytest.fixture
def config(folder, tmp_path):
    """Make a run's configuration, from its data file."""

    def config(data, **changes):
        kept = dict(
            data=data, image_folder=str(folder), output=str(tmp_path / "run"), max_length=240, global_batch_size=12,
            workers=2, seed=3,
        )  # fmt: skip
        return TrainConfig(**kept | changes)

    return config


@pytest.fixture
def bucket(monkeypatch, tmp_path_factory):
    """An empty bucket of a local server that answers as Cloud Storage does: its URL. Processes that a test starts reach
    it too."""
    # A preparation locks a directory that is named after its output, which other tests running at the same time share.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.socket.getsockname()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield "gs://bucket"
    fsspec.config.conf.pop("gs", None)
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def in_process(monkeypatch):
    """The jobs of a preparation run in this process, which takes no time to start."""
    for module in ("__main__", "verify", "lengths"):
        monkeypatch.setattr(
            f"train.datasets.prepare.{module}.run_jobs", lambda run, jobs, _, report: (run(job, report) for job in jobs)
        )


@pytest.fixture(name="prepare")
def _prepare(run_cli, folder, tmp_path):
    """Run `train.datasets.prepare` with some flags: (exit status, standard error)."""

    def run(*flags, output="out"):
        location = output if "://" in str(output) else tmp_path / output
        status, out, err = run_cli(
            preparing.main, "--image-folder", folder, "--output", location, "--workers", 2, *flags
        )
        assert not out
        return status, err

    return run


# ---------------------------------------------------------------- runs

WORDS = ("cat", "dog", "tree", "house", "street")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twenty conversations; those with an image, as stage 1 wants them; half of these for evaluation."""
    directory = tmp_path_factory.mktemp("data")
    shutil.copytree(GOLDEN / "images", directory / "images")
    names = sorted(path.name for path in (directory / "images").iterdir())
    rows = []
    for i in range(20):
        question = "What is this?" if i % 5 == 0 else "<image>\nWhat is this?"
        answer = " ".join(WORDS[(i * k) % 5] for k in range(1, 3 + i % 4))
        talk = turns(question, answer)
        rows.append({"id": f"r{i}", "conversations": talk} | ({"image": names[i % len(names)]} if i % 5 else {}))
    (directory / "data.json").write_text(json.dumps(rows))
    pictured = [row for row in rows if "image" in row]
    (directory / "plain.json").write_text(json.dumps(pictured))
    (directory / "eval.json").write_text(json.dumps(pictured[::2]))
    return directory


@pytest.fixture
def on_one_device(monkeypatch):
    """Runs in this process use one of its eight devices: that compiles faster."""
    monkeypatch.setattr("train.run.make_mesh", mesh_of_one)


@pytest.fixture
def train(run_cli, data):
    """Run the command: (exit status, standard output, standard error)."""
    return lambda output, *more: run_cli(command.main, *flags(data, output, *more))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """An undisturbed run, evaluated and traced on the way: its directory, and what it said."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = ("--eval-data", data / "eval.json", "--eval-every", 5, "--keep", 1, "--profile-steps", "2:3")
    with pytest.MonkeyPatch.context() as patch, open(output.parent / "said", "w+") as said:
        patch.setattr("train.run.make_mesh", mesh_of_one)
        patch.setattr("sys.stderr", said)
        _, config = command.read_config(flags(data, output, *more))
        assert loop.train(prepare(config)) == 0
    return output, (output.parent / "said").read_text()
