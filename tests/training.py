"""What tests of training share: conversations, every way in which one may be broken, batches, and runs."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from helpers import GOLDEN, one_device, turns
from llava_jax import config as c
from llava_jax.data import images
from llava_jax.data.splice import IGNORE, IMAGE, Row
from llava_jax.models import llava
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import put_rows
from train.config import TrainConfig
from train.step import setup

# ---------------------------------------------------------------- data

SAME = ("ids", "labels", "positions", "segments", "feature_rows", "tiles")
PHOTO = {"image": "0.png"}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]


def good_row(i: int) -> dict:
    """A conversation about one image, two, or none; no two are alike."""
    answer = f"{i} " + "the " * (i * 7 % 23)
    if i % 10 == 3:
        return {"id": f"row{i}", "conversations": turns(f"Say {i}", answer, "More?", "is and")}
    if i % 10 == 7:
        images = [f"{i % 12}.png", f"{i * 5 % 12}.png"]
        return {"id": f"row{i}", "image": images, "conversations": turns("From <image> to <image>?", answer)}
    return {"id": f"row{i}", "image": f"{i % 12}.png", "conversations": turns("<image>\nWhat?", answer)}


def parts(*content, role="user"):
    return {"role": role, "content": content}


# What may be wrong with a line of the data file, and what is said about it.
BROKEN = {
    "{": "not JSON",
    '"text"': "not a JSON object",
    "[1]": "not a JSON object",
    '{"id": 1}': "conversations must be a list",
    '{"conversations": []}': "conversations must be a list",
    '{"conversations": [1]}': "each turn of conversations must have from and value",
    '{"conversations": [{"from": "human"}]}': "each turn of conversations must have from and value",
    '{"conversations": [{"from": "human", "value": 3}]}': "each turn of conversations must have from and value",
    json.dumps({"conversations": turns("\ud800", "x")}): "not valid Unicode",
    json.dumps({"conversations": [{"from": "human", "value": "a"}] * 2}): "speakers must take turns",
    json.dumps({"conversations": [{"from": "system", "value": "a"}]}): "no answer",
    json.dumps({"conversations": turns("a")}): "no answer",
    json.dumps({"conversations": turns("a", "")}): "no answer",
    json.dumps({"conversations": turns("<image>\na", "x")}): "1 <image> tokens for 0 images",
    json.dumps(PHOTO | {"conversations": turns("a", "x")}): "0 <image> tokens for 1 images",
    json.dumps(PHOTO | {"conversations": turns("<image>\na", "x", "<image>", "y")}): "2 <image> tokens for 1 images",
    json.dumps({"image": ["0.png"] * 2, "conversations": turns("<image>", "x")}): "1 <image> tokens for 2 images",
    json.dumps({"image": 3, "conversations": turns("<image>", "x")}): "image must be a file name",
    json.dumps({"image": [""], "conversations": turns("<image>", "x")}): "image must be a file name",
    json.dumps({"images": 3, "conversations": turns("<image>", "x")}): "images must be a file name",
    json.dumps(PHOTO | {"images": ["0.png"], "conversations": turns("<image>", "x")}): "both image and images",
    json.dumps({"messages": MESSAGES, "conversations": turns("a", "x")}): "both conversations and messages",
    json.dumps({"messages": [MESSAGES[0] | {"from": "human"}, MESSAGES[1]]}): "both from and role",
    json.dumps({"messages": [{"role": "user"}]}): "each turn of messages must have role and content",
    json.dumps({"messages": [*MESSAGES, {"role": "tool", "content": "3"}]}): "unknown speaker 'tool'; supported: human",
    json.dumps({"messages": [*MESSAGES, {"role": "system", "content": "a"}]}): "must be the first turn",
    json.dumps({"system": "a", "messages": [{"role": "system", "content": "a"}, *MESSAGES]}): "have a system message",
    json.dumps({"system": ["a"], "messages": MESSAGES}): "system must be text",
    json.dumps({"system": "\ud800", "messages": MESSAGES}): "not valid Unicode",
    json.dumps(PHOTO | {"system": "<image>", "messages": MESSAGES}): "the system message has an <image> token",
    json.dumps({"messages": [parts({"type": "video", "video": "a.mp4"}), MESSAGES[1]]}): "part has type video;",
    json.dumps({"messages": [parts({"type": "text"}), MESSAGES[1]]}): "a message part of type text has no text",
    json.dumps({"messages": [parts("a"), MESSAGES[1]]}): "a message part has type unknown",
    json.dumps({"messages": [parts({"type": "image"}), MESSAGES[1]]}): "refers to image 0, but images has 0",
    json.dumps({"messages": [parts({"type": "image", "image": 3}), MESSAGES[1]]}): "an image part must name a file",
    json.dumps(PHOTO | {"messages": [parts({"type": "image", "path": "1.png"}), MESSAGES[1]]}): "images name files",
    json.dumps(PHOTO | {"messages": [parts({"type": "image", "index": 1}), MESSAGES[1]]}): "part refers to image",
    json.dumps({"images": ["0.png", "1.png"], "messages": [parts({"type": "image"}), MESSAGES[1]]}):
        "1 image parts for 2 images",
    json.dumps({"images": ["0.png", "0.png"], "messages": [parts({"type": "image"}), MESSAGES[1]]}):
        "1 image parts for 2 images: no part refers to image 1 (counted from 0)",
    json.dumps({"images": ["0.png"] * 2, "messages": [parts(*[{"type": "image", "index": 1}] * 2), MESSAGES[1]]}):
        "2 image parts for 2 images: no part refers to image 0 (counted from 0)",
    json.dumps({"images": ["0.png", "1.png"],
                "messages": [parts({"type": "image", "index": 1}, {"type": "image"}), MESSAGES[1]]}):
        "some image parts have an index and some do not",
    json.dumps(PHOTO | {"messages": [parts({"type": "image", "index": False}), MESSAGES[1]]}):
        "part refers to image False",
    json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": [1]}]}): "tool calls are not supported",
    json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}]}): "weight: turn weights are not supported",
    json.dumps({"messages": [MESSAGES[0] | {"images": ["0.png"]}, MESSAGES[1]]}): "images: not supported in a turn",
} | {
    json.dumps({key: value, "messages": MESSAGES}): f"{key}: {says}"
    for key, value, says in [
        ("video", "a.mp4", "video is not supported"), ("videos", ["a.mp4"], "video is not supported"),
        ("audio", "a.wav", "audio is not supported"), ("audios", ["a.wav"], "audio is not supported"),
        ("tools", "[]", "tool calls"), ("functions", [1], "tool calls"), ("chosen", {"value": "x"}, "preference"),
        ("rejected", "x", "preference"), ("kto_tag", False, "preference"),
        ("image_url", "0.png", "not a supported key"), ("image_path", "0.png", "not a supported key"),
    ]
} | {
    json.dumps({"image": name, "conversations": turns("<image>\nWhat?", "x")}): says
    for name, says in {
        "missing.png": "no such image",
        "missing/0.png": "no such image",
        "truncated.png": "broken image",
        "truncated.jpg": "broken image",
        "text.png": "not an image",
        "empty.png": "not an image",
        "directory.png": "a directory",
        "thin.png": "is an unsupported size",
        "/etc/passwd": "is outside the image folder",
        "../0.png": "is outside the image folder",
        "a/../../0.png": "is outside the image folder",
        "nul\0.png": "cannot be read",
        "https://example.com/a.png": "images in data files are not downloaded",
        "HTTP://example.com/a.png": "images in data files are not downloaded",
        "file:///etc/passwd": "is outside the image folder",
        "file://host/0.png": "a file on host host",
        "file:///../0.png": "is outside the image folder",
        "data:image/png;base64,????": "invalid base64",
        "data:image/png;base64,aGVsbG8=": "not an image",
        "data:text/plain,hello": "not of an image",
    }.items()
}  # fmt: skip


def write_rows(path: Path, rows: list) -> str:
    """Conversations as a list, or as lines in a `.jsonl` file; lines may be given as they stand."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def take(data, n=None):
    """The first n batches of the data, or all there are."""
    found = [next(data) for _ in range(n)] if n else list(data)
    data.close()
    return found


def assert_same_batches(ours, theirs):
    assert [info["ids"] for _, info in ours] == [info["ids"] for _, info in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        for name in SAME:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# ---------------------------------------------------------------- steps

# A step that is easily computed again: no warm-up, no clipping, float32.
PLAIN = TrainConfig(
    learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0, dtype="float32", lora_rank=4,
    lora_alpha=8.0,
)  # fmt: skip


def random_params(model):
    """Weights large enough that every part matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), llava.param_shapes(model))


def start(config: TrainConfig, batch, model=None, mesh=None, params=None, total_steps: int = 8):
    """`setup`, compiled for a batch: frozen, state, step, eval, the batch on the mesh."""
    model, mesh = model or c.tiny(), mesh or one_device()
    frozen, state, step, evaluate = setup(params or random_params(model), model, config, mesh, total_steps)
    batch = jax.tree.map(lambda x: put_rows(x, mesh), batch)
    step = step.lower(frozen, state, batch).compile()
    return frozen, state, step, evaluate, batch


def conversation(rng: np.random.Generator, model, sizes=()) -> Row:
    """Random ids and images; what comes after the images is partly labelled."""
    places = tuple(images.tile_layout(size, model) for size in sizes)
    side = model.vision.image_size
    tiles = tuple(rng.integers(0, 256, (place.tiles, side, side, 3), dtype=np.uint8) for place in places)
    text = rng.integers(3, model.text.vocab_size, rng.integers(20, 50)).astype(np.int32)
    ids = np.concatenate([text[:2], np.full(len(sizes), IMAGE, np.int32), text[2:]])
    labels = np.where((np.arange(len(ids)) > len(sizes) + 8) & (rng.random(len(ids)) < 0.6), ids, IGNORE)
    labels[0] = ids[0]  # nothing comes before it to predict it
    return Row(ids, places, tiles, labels.astype(np.int32))


@functools.cache
def conversations(model) -> list[Row]:
    rng = np.random.default_rng(0)
    sizes = [(), ((20, 20),), (), ((40, 28), (28, 28))] * 4
    return [conversation(rng, model, several) for several in sizes]


# ---------------------------------------------------------------- runs

CHECKPOINT = GOLDEN / "checkpoints/v1.5-llama"


def mesh_of_one(sizes):
    """Whatever was asked for: one of the eight devices."""
    return make_mesh({}, jax.devices()[:1])


def flags(data, output, *more) -> list[str]:
    """A short stage 1; a later flag wins, but for `--data`, of which there may be several."""
    own = () if "--data" in more else ("--data", data / "plain.json")
    return [str(part) for part in (
        "--preset", "v1.5-pretrain", "--checkpoint", CHECKPOINT, *own, "--image-folder", data / "images",
        "--output", output, "--global-batch-size", 16, "--max-length", 128, "--dtype", "float32",
        "--learning-rate", 1e-2, "--workers", 1, "--steps", 10, "--save-every", 2, *more,
    )]  # fmt: skip


def read_metrics(output) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps_and_losses(output) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output)]
