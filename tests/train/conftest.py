"""Images, checkpoints and settings for tests of training."""

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN
from llava_jax.checkpoints.checkpoint import open_checkpoint
from train.config import TrainConfig
from training_data import write_rows

SIZES = [(20, 20), (40, 20), (20, 50), (56, 56), (90, 30), (30, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures 0.png ... 11.png, all different, and broken ones."""
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
