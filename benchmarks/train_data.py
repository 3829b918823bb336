"""The padding of batches, and the time that training steps wait for data.

    python benchmarks/train_data.py --json data.json
    python benchmarks/train_data.py --prepared --read-seconds 0.05 --workers 16

Lengths are drawn like mix665k's (40 % short answers about an image, 6 % text only, the rest conversations about an
image), for v1.5 at 336 pixels. Padding is measured for packed rows, bucketed rows, and grain's first-fit packing.
Waiting is measured in a loop that takes a batch and then sleeps for the given step time. Images are JPEGs of COCO's
sizes, or, with `--images mix`, of sizes as various as mix665k's: with `--aspect-ratio anyres` they then have 1,476 to
2,928 features instead of about 2,340.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# ruff: noqa: E402
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this directory: `train` is the package, not the file here

import grain
import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig, preset
from llava_jax.data.images import tile_layout
from llava_jax.data.prompts import encode_conversation
from llava_jax.data.splice import count_features
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from train.config import TrainConfig
from train.loader import open_data
from train.row_packing import WINDOW, fill_rows
from train.stores import Store
from train.synthetic_data import draw_lengths

ROOT = Path(__file__).parents[1]
COCO = [(640, 480), (480, 640), (640, 427), (500, 375)]
# Assumed: COCO and Visual Genome, covers of books (OCR-VQA), photos of 1,024 pixels (TextVQA), squares.
MIX = [
    *[(640, 480)] * 11, *[(480, 640)] * 4, *[(640, 427)] * 4, *[(427, 640)] * 2, *[(500, 375)] * 2, *[(333, 500)] * 4,
    (1024, 768), (768, 1024), (1024, 683), (640, 360), (612, 612),
]  # fmt: skip
IMAGES = 32
COMPILE_SECONDS = 5  # between the first batch and the second, as if a step were compiled
GOALS = {"padding": 0.05, "waiting": 0.02}
TEMPLATE = "mistral_instruct"  # no system text, so that any length is possible
WORD = "the"  # one token of the tests' tokenizer


def conversation(has_image: bool, words: int) -> list[dict[str, str]]:
    question = "<image>\nHi" if has_image else "Hi"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join([WORD] * words)}]


def write_data(
    folder: Path, tokenizer, lengths: np.ndarray, has_image: np.ndarray, features: np.ndarray | int, sizes=COCO
) -> Path:
    """Write a data file of conversations with these numbers of positions, and its images, whose sizes repeat `sizes`.

    Args:
      features: positions of each conversation that are its image's, or of all.
    """
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        width, height = sizes[i % len(sizes)]
        small = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    words = lengths - (features - 1) * has_image
    rows = []
    for i, (length, with_image) in enumerate(zip(words.tolist(), has_image.tolist(), strict=True)):
        ids, _ = encode_conversation(conversation(with_image, 1), get_template(TEMPLATE), tokenizer)
        row = {"id": i, "conversations": conversation(with_image, max(1, length - (len(ids) - 1)))}
        rows.append(row | ({"image": f"{i % IMAGES}.jpg"} if with_image else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def image_features(n: int, sizes: list[tuple[int, int]], model: LlavaConfig) -> np.ndarray:
    """The positions of the image of each of n conversations: int [n]."""
    counts = [count_features(tile_layout(size, model), model) for size in sizes]
    return np.array(counts)[np.arange(n) % IMAGES % len(sizes)]


def packed(sizes: list[tuple[int, int]], length: int, tiles: int) -> dict[str, float]:
    """Padding of our packing, window by window as in training, and its time per conversation."""
    start = time.process_time()
    rows = sum(len(fill_rows(sizes[i : i + WINDOW], length, tiles)) for i in range(0, len(sizes), WINDOW))
    seconds = time.process_time() - start
    return {
        "packed": 1 - sum(n for n, _ in sizes) / (length * rows),
        "packed_tiles": 1 - sum(t for _, t in sizes) / (tiles * rows),
        "packing_milliseconds": 1000 * seconds / len(sizes),
    }


def first_fit(sizes: list[tuple[int, int]], length: int, tiles: int) -> float:
    """Padding of grain's first-fit packing on the same conversations."""
    source = grain.MapDataset.source([{"positions": np.zeros(n, bool), "tiles": np.zeros(t, bool)} for n, t in sizes])
    rows = grain.experimental.FirstFitPackIterDataset(
        source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"positions": length, "tiles": tiles},
        num_packing_bins=256,
    )
    return 1 - sum(n for n, _ in sizes) / (length * sum(1 for _ in rows))


def wait_share(data, steps: int, seconds: float) -> dict[str, float]:
    """The share of time that a loop of steps of fixed length waits for batches, after its start."""
    start = time.monotonic()
    next(data)
    first, waited, conversations = time.monotonic() - start, 0.0, 0
    time.sleep(COMPILE_SECONDS)
    worked = time.process_time()
    for _ in range(steps):
        time.sleep(seconds)
        start = time.monotonic()
        _, info = next(data)
        waited += time.monotonic() - start
        conversations += info["conversations"]
    return {
        "waiting": waited / (waited + steps * seconds),
        "first_batch_seconds": first,
        "conversations_per_second": conversations / (waited + steps * seconds),
        "cpu_milliseconds_per_conversation": 1000 * (time.process_time() - worked) / conversations,
    }


def prepare(path: Path, seconds: float) -> str:
    """Prepare a data file whose images are beside it. Reading of the result then takes some seconds more each time."""
    output, read_range = path.parent / "prepared", Store.read_range

    def slow(self, *range):
        time.sleep(seconds)
        return read_range(self, *range)

    command = [sys.executable, "-m", "train.datasets.prepare", "--data", path, "--image-folder", path.parent]
    subprocess.run([*map(str, command), "--output", str(output)], check=True, cwd=ROOT)
    Store.read_range = slow  # type: ignore[method-assign]
    return str(output)


def main() -> None:
    p = argparse.ArgumentParser(description="What batching wastes, and whether a step waits for its data.")
    p.add_argument("--conversations", type=int, default=8192, help="in the data file")
    p.add_argument("--batch-size", type=int, default=128, help="of the global batch, for padding")
    p.add_argument("--host-batch-size", type=int, default=16, help="conversations a step of this process, for waiting")
    p.add_argument("--step-seconds", type=float, default=0.5)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--aspect-ratio", default="pad", choices=["square", "pad", "anyres"])
    p.add_argument("--max-length", type=int, default=2048)
    p.add_argument("--images", default="coco", choices=["coco", "mix"], help="sizes of the images")
    p.add_argument("--prepared", action="store_true", help="wait for batches of a prepared dataset")
    p.add_argument("--read-seconds", type=float, default=0, help="that each read of it takes more, as in a bucket")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    args = p.parse_args()
    model = preset("v1.6-vicuna-7b" if args.aspect_ratio == "anyres" else "v1.5-7b")
    model = model.replace(aspect_ratio=args.aspect_ratio)
    image_sizes = {"coco": COCO, "mix": MIX}[args.images]
    # With COCO's sizes, text as long as if each image had the features of 640 x 480 pixels.
    features = image_features(args.conversations, COCO[:1] if args.images == "coco" else MIX, model)
    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "tokenizer")
    result = {"settings": vars(args), "goals": GOALS}
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_lengths(args.conversations, 0, features, args.max_length)
        path = write_data(Path(folder), tokenizer, *drawn, features, image_sizes)
        config = TrainConfig(
            data=str(path), image_folder=folder, template=TEMPLATE, max_length=args.max_length,
            global_batch_size=args.batch_size, workers=args.workers, aspect_ratio=args.aspect_ratio,
        )  # fmt: skip
        data = open_data(config, model, tokenizer)
        sizes = [(one.length, one.tiles) for one in map(data.samples.measure, range(len(data.samples)))]
        result["row"] = {"positions": data.length, "tiles": data.tiles}
        padding = {
            **packed(sizes, data.length, data.tiles),
            "first_fit": first_fit(sizes, data.length, data.tiles),
        }
        data.close()
        data = open_data(config.replace(batching="bucketed"), model, tokenizer)
        padding |= {"bucketed": data.estimate()["padding"], "bucketed_tiles": data.estimate()["tile_padding"]}
        data.close()
        result["padding"] = padding
        print(
            f"padding of positions: packed, rows of {result['row']['positions']}, {padding['packed']:.1%} (goal "
            f"{GOALS['padding']:.0%}; grain's first-fit packing {padding['first_fit']:.1%}); bucketed "
            f"{padding['bucketed']:.1%}; of tiles: {padding['packed_tiles']:.1%} and {padding['bucketed_tiles']:.1%}; "
            f"packing takes {padding['packing_milliseconds']:.3f} ms a conversation"
        )
        if args.prepared:
            config = config.replace(data=prepare(path, args.read_seconds))
        data = open_data(config.replace(global_batch_size=args.host_batch_size), model, tokenizer)
        found = result["waiting"] = wait_share(data, args.steps, args.step_seconds)
        data.close()
    print(
        f"{args.workers} workers, steps of {args.step_seconds} s: {found['waiting']:.2%} of the time is waiting "
        f"(goal {GOALS['waiting']:.0%}); {found['conversations_per_second']:.1f} conversations/s, "
        f"{found['cpu_milliseconds_per_conversation']:.1f} ms of a core each"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
