"""What tests share beside fixtures: the reference's golden data, checkpoints and conversations made for tests, files.

`conftest.py`, which pytest imports first, chooses JAX's devices and how much XLA optimizes.
"""

import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from infer.engine import Engine
from llava_jax.checkpoints import checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data import images, splice
from llava_jax.data.prompts import encode_conversation
from llava_jax.data.templates import get_template
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import path_of

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZERS = GOLDEN / "tokenizers"
CHECKPOINTS = ("v1-linear-llama", "v1.5-llama", "v1.6-mistral", "v1.6-spatial-llama")
QUESTION = "Is there any person in this photo?"


def golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


@functools.cache
def one_device():
    return make_mesh({}, jax.devices()[:1])


def user_environment() -> dict[str, str]:
    """For commands that are run as users run them: programs in full, on one device."""
    ours = ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {name: value for name, value in os.environ.items() if name not in ours}


# ---------------------------------------------------------------- golden checkpoints


@functools.cache
def load_golden(name: str):
    """A golden checkpoint read directly: (checkpoint, parameters on one device)."""
    found = checkpoint.open_checkpoint(GOLDEN / "checkpoints" / name)
    return found, found.load(one_device(), np.float32)


@functools.cache
def golden_engine(name: str) -> Engine:
    found, params = load_golden(name)
    return Engine(params, found.config, found.tokenizer, one_device())


def golden_tensors(name: str, part: str = ".") -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "checkpoints" / name / part / "model.safetensors")


def write_checkpoint(directory: Path, tensors: dict, like: str, **config_changes) -> Path:
    """A checkpoint directory: given tensors, a golden checkpoint's config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / "checkpoints" / like).iterdir():
        if file.suffix in (".json", ".model") and not file.name.startswith("expected"):
            shutil.copy(file, directory)
    tower = directory / "vision_tower"  # its configuration, not its weights
    tower.mkdir(exist_ok=True)
    for file in (GOLDEN / "checkpoints" / like / "vision_tower").glob("*.json"):
        shutil.copy(file, tower)
    config = json.loads((directory / "config.json").read_text()) | config_changes
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / "model.safetensors")
    return directory


def leaves(params) -> dict[str, np.ndarray]:
    """Arrays of a tree by their paths."""
    return {path_of(k): np.asarray(x) for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def assert_same_params(a, b) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def copy_tokenizer(kind: str, directory, **settings):
    """A golden tokenizer with other settings: its directory."""
    shutil.copytree(TOKENIZERS / kind, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


# ---------------------------------------------------------------- configurations

# config.json as the originals have it, and as the hub has it, where what has a default is left out.
ORIGINAL_CONFIG = {
    "model_type": "llava_llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "[[336, 672], [672, 336]]",
}
HUB_CONFIG = {
    "model_type": "llava",
    "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 336,
    },
    "image_token_index": 32000,
}  # fmt: skip


# ---------------------------------------------------------------- conversations


def turns(*values) -> list[dict]:
    """The turns of a conversation, as a data file has them."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def make_row(conversation, image_files, template: str, config: LlavaConfig, tokenizer) -> splice.Row:
    """A training row from a conversation and the paths of its images."""
    ids, labels = encode_conversation(conversation, get_template(template), tokenizer, config, images=len(image_files))
    opened = [images.open_image(path) for path in image_files]
    places = tuple(images.tile_layout(image.size, config) for image in opened)
    tiles = tuple(images.tile_image(image, place, config) for image, place in zip(opened, places, strict=True))
    return splice.Row(ids, places, tiles, labels)


# ---------------------------------------------------------------- files


def put_file(path, text="precious"):
    """A file with a text, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(directory):
    """Every path below a directory, with what a file holds and where a link leads."""

    def content(path):
        return os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()

    return {str(path.relative_to(directory)): content(path) for path in directory.rglob("*")}


def image_file(image: Image.Image, format: str, **options) -> bytes:
    """The bytes of a file with an image."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """While it lasts no file grows beyond so many bytes: what a full disk does, as anybody may have it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def damage(data: bytes, pick: random.Random) -> bytes:
    """A few bytes changed, put in or left out."""
    data = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at, what = pick.randrange(len(data)), pick.random()
        if what < 0.7:
            data[at] = pick.randrange(256)
        elif what < 0.85:
            data[at:at] = pick.randbytes(pick.randrange(9))
        else:
            del data[at : at + pick.choice([1, 8, len(data)])]
        if not data:
            return b""
    return bytes(data)


def read_damaged(File, whole: Path) -> tuple[int, int]:
    """Damage a file of tensors in 3000 ways: how often it is read, and how often refused in one line."""
    data, path, pick = whole.read_bytes(), whole.with_stem("damaged"), random.Random(0)
    read = refused = 0
    for _ in range(3000):
        path.write_bytes(damage(data, pick))
        try:
            file = File(path)
            for name, (dtype, shape, *_) in file.tensors.items():
                assert np.prod(shape) * dtype.itemsize <= path.stat().st_size
                file.read(name)
            read += 1
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    return read, refused
