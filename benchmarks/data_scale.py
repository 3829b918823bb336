"""What a process of a pod needs of a dataset of any size: time to the first batch, memory, bytes read, time to plan.

    python benchmarks/data_scale.py --json data_scale.json

The dataset is synthetic, prepared, and as large as `--rows` says; its rows repeat a few thousand conversations and its
images a few dozen, so that the disk holds it, but its index has an entry for each. Each measurement is a process of its
own, which is process 0, the middle or the last one of `--processes`, one after the other: all plan everything, and read
the images of their own shard of each batch. `--file-rows` measures a JSON file of that many rows in the same way.
"""

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

# ruff: noqa: E402
START = time.monotonic()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this directory: `train` is the package, not the file here

import numpy as np
from PIL import Image

from llava_jax.config import preset
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from train import mixture
from train.config import TrainConfig
from train.lengths import Length, Lengths, contents_of, lengths_key, lengths_name
from train.loader import Data, open_data
from train.prepared import DATASET, FORMAT, INDEX, Index, PreparedDataset, conversations_name, images_name
from train.row_packing import WINDOW
from train.samples import measure_within

GOALS = {
    "file": {"rows": 665_000, "seconds": 60, "gigabytes": 2},
    "prepared": {"rows": 665_000, "seconds": 30, "gigabytes": 1},
    "large": {"rows": 5_000_000, "seconds": 60, "gigabytes": 2},
    "share": 1.1,  # image bytes read, relative to a process's shard
}
TEMPLATE = "v1"
MODELS = {"square": "v1.5-7b", "pad": "v1.5-7b", "anyres": "v1.6-vicuna-7b"}
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (333, 500), (640, 640), (1024, 768))
WORDS = "the of and a to in is you that it he was for on are as with his they at be this have from or one had".split()
TEXTS, IMAGES = 4096, 64  # distinct ones
SHORT, TEXT_ONLY = 0.40, 0.06  # shares of the conversations, as in mix665k
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"


# ---------------------------------------------------------------- the dataset


def conversation(random: np.random.Generator) -> dict[str, Any]:
    """A conversation of a kind and a length as in mix665k, without id and image."""
    kind = random.choice(3, p=[SHORT, 1 - SHORT - TEXT_ONLY, TEXT_ONLY])
    turns = []
    for i in range(1 if kind == 0 else int(random.integers(1, 5))):
        question = " ".join(random.choice(WORDS, int(random.integers(5, 20))))
        answer = " ".join(
            random.choice(WORDS, int(random.integers(1, 8) if kind == 0 else random.lognormal(3.8, 0.7) + 3))
        )
        turns += [
            {"from": "human", "value": ("<image>\n" if i == 0 and kind < 2 else "") + question},
            {"from": "gpt", "value": answer},
        ]
    return {"image": "a.jpg"} | {"conversations": turns} if kind < 2 else {"conversations": turns}


def image_files(random: np.random.Generator) -> list[tuple[bytes, tuple[int, int]]]:
    """JPEG files, and their sizes."""
    files = []
    for i in range(IMAGES):
        width, height = SIZES[i % len(SIZES)]
        small = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append((buffer.getvalue(), (width, height)))
    return files


def write_file(folder: Path, rows: int) -> Path:
    """A data file of `rows` conversations, and its images."""
    random = np.random.default_rng(0)
    for i, (data, _) in enumerate(image_files(random)):
        (folder / f"{i}.jpg").write_bytes(data)
    texts = [conversation(random) for _ in range(TEXTS)]
    path = folder / "data.json"
    with path.open("w") as file:
        for i in range(rows):
            row = texts[int(random.integers(TEXTS))]
            row = {"id": f"{i:012}"} | row | ({"image": f"{i % IMAGES}.jpg"} if "image" in row else {})
            file.write(("[" if i == 0 else ", ") + json.dumps(row))
        file.write("]")
    return path


def write_prepared(folder: Path, rows: int, model) -> Path:
    """A prepared dataset of `rows` conversations, three quarters of as many images, and all lengths."""
    random = np.random.default_rng(0)
    files, texts = image_files(random), [conversation(random) for _ in range(TEXTS)]
    starts = []
    with tarfile.open(folder / images_name(0), "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (data, _) in enumerate(files):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(data)
            starts.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(data))
    lines = [json.dumps({"id": 0} | text).encode() + b"\n" for text in texts]
    (folder / conversations_name(0)).write_bytes(b"".join(lines))
    text_of = random.integers(TEXTS, size=rows)
    with_image = np.array(["image" in text for text in texts])[text_of]
    images = rows * 3 // 4
    image_of = random.integers(images, size=int(with_image.sum()), dtype=np.uint32)
    file_of = random.integers(IMAGES, size=images)
    ids = np.frombuffer(b"".join(b'"%012d"' % i for i in range(rows)), np.uint8)
    sizes = np.array([len(line) for line in lines], np.uint32)
    index = Index(
        row_start=(np.cumsum(sizes) - sizes).astype(np.uint64)[text_of],
        row_bytes=sizes[text_of],
        row_crc=np.array([zlib.crc32(line) for line in lines], np.uint32)[text_of],
        row_images=with_image.astype(np.uint16),
        id_end=np.arange(1, rows + 1, dtype=np.uint64) * 14,
        ids=ids,
        image_of=image_of,
        image_start=np.array(starts, np.uint64)[file_of],
        image_bytes=np.array([len(data) for data, _ in files], np.uint32)[file_of],
        image_crc=np.array([zlib.crc32(data) for data, _ in files], np.uint32)[file_of],
        image_size=np.array([size for _, size in files], np.int32)[file_of],
    )  # fmt: skip
    data = index.save()
    (folder / INDEX).write_bytes(data)
    shard = lambda name, count: dict(name=name, bytes=(folder / name).stat().st_size, sha256="", count=count)  # noqa: E731
    described = dict(
        format=FORMAT, index=hashlib.sha256(data).hexdigest(), system=False,
        conversations=[shard(conversations_name(0), rows)], images=[shard(images_name(0), images)],
    )  # fmt: skip
    (folder / DATASET).write_text(json.dumps(described))
    _write_lengths(folder, described["index"], texts, text_of, model)
    return folder


def _write_lengths(folder: Path, digest: str, texts: list[dict], text_of: np.ndarray, model) -> None:
    template, tokenizer = get_template(TEMPLATE), load_tokenizer(TOKENIZER)
    prepare_tokenizer(tokenizer, model)
    encoded = [encode_conversation(text["conversations"], template, tokenizer, model) for text in texts]
    each = [Length.of(ids, labels) for ids, labels in encoded]
    lengths = Lengths(np.zeros(0, np.uint16), 1)
    lengths.tokens = np.array([[one.tokens for one in each]], np.int32)[:, text_of]
    lengths.label = np.array([[one.label for one in each]], np.int32)[:, text_of]
    places = np.array([one.images[0] if len(one.images) else -1 for one in each], np.int32)[text_of]
    lengths.images = places[places >= 0][None]
    name = lengths_name(lengths_key(template, tokenizer, model, 1))
    (folder / name).write_bytes(lengths.save(contents_of(digest, name)))


# ---------------------------------------------------------------- one process


def measure_process(args: argparse.Namespace) -> dict[str, Any]:
    """Open the data as process `--process` of `--of`, take batches, and plan some windows."""
    model, tokenizer = preset(MODELS[args.aspect_ratio]), load_tokenizer(TOKENIZER)
    read = _count_image_bytes()
    config = TrainConfig(
        data=args.data, image_folder=args.images, template=TEMPLATE, aspect_ratio=args.aspect_ratio, workers=2,
        max_length=4096 if args.aspect_ratio == "anyres" else 2048, global_batch_size=16 * args.of,
    )  # fmt: skip
    mixture.checksum(mixture.read_parts(config.data))
    data = open_data(config, model, tokenizer, process=args.process, processes=args.of)
    next(data)
    result = {"process": args.process, "of": args.of, "seconds_to_first_batch": time.monotonic() - START}
    before, begun, share, conversations = read["bytes"], time.monotonic(), 0.0, 0
    for _ in range(args.batches):
        _, info = next(data)
        share += _referenced(data, info["ids"]) / args.of
        conversations += info["conversations"]
    data.close()
    result |= {
        "conversations_per_second": conversations / args.of / (time.monotonic() - begun),
        "read_of_shard": (read["bytes"] - before) / share if share else None,
        "plan_milliseconds_per_conversation": plan_milliseconds(data, args.windows),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "length": data.length,
        "padding": data.estimate()["padding"],
    }
    return result


def _count_image_bytes() -> dict[str, int]:
    """Count the bytes of images that are read from a prepared dataset."""
    counted, image = {"bytes": 0}, PreparedDataset.image

    def counting(self, row, place):
        data = image(self, row, place)
        counted["bytes"] += len(data)
        return data

    PreparedDataset.image = counting  # type: ignore[method-assign]
    return counted


def _referenced(data: Data, ids: list[Any]) -> int:
    """The bytes of the images of the conversations with these ids, in a prepared dataset."""
    if not (dataset := getattr(data.samples.sources[0], "dataset", None)):  # type: ignore[attr-defined]
        return 0
    references = [dataset.image_bytes(int(name), k) for name in ids for k in range(dataset.image_counts[int(name)])]
    return sum(references)


def plan_milliseconds(data: Data, windows: int) -> float:
    """Processor time to measure and to pack a conversation, alone, in the last windows of an epoch, whose text no batch
    has needed so far; the first of them is not counted."""
    order = data.batches.order()
    begun = 0.0
    for i, number in enumerate(range(len(order) - 2 - windows, len(order) - 1)):
        if i == 1:
            begun = time.process_time()
        found = [measure_within(data.samples, data.tiles, index) for index in order[number]]
        data.batches.distribute(number, found)
    return 1000 * (time.process_time() - begun) / (windows * WINDOW)


# ---------------------------------------------------------------- all of them


def run_process(data: Path, images: Path, ratio: str, process: int, of: int, args: argparse.Namespace) -> dict:
    command = [
        sys.executable, __file__, "--data", str(data), "--images", str(images), "--aspect-ratio", ratio,
        "--process", str(process), "--of", str(of), "--batches", str(args.batches), "--windows", str(args.windows),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description="What a process of a pod needs of a dataset of any size.")
    p.add_argument("--rows", type=int, nargs="*", default=[665_000, 5_000_000], help="of prepared datasets")
    p.add_argument("--file-rows", type=int, nargs="*", default=[665_000], help="of JSON files")
    p.add_argument("--processes", type=int, nargs="*", default=[16, 64])
    p.add_argument("--ratios", nargs="*", default=["pad", "anyres"], choices=list(MODELS))
    p.add_argument("--batches", type=int, default=100, help="that each process reads after the first")
    p.add_argument("--windows", type=int, default=4, help="that are planned to measure the time")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    for hidden in ("--data", "--images", "--aspect-ratio"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--process", "--of"):
        p.add_argument(hidden, type=int, default=1, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.data:
        print(json.dumps(measure_process(args)))
        return
    results = []
    for kind, rows, ratio in [("file", n, "pad") for n in args.file_rows] + [
        ("prepared", n, ratio) for n in args.rows for ratio in args.ratios
    ]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = write_file(folder, rows) if kind == "file" else write_prepared(folder, rows, preset(MODELS[ratio]))
            for of in args.processes:
                for process in sorted({0, of // 2, of - 1}):
                    found = {"kind": kind, "rows": rows, "aspect_ratio": ratio}
                    found |= run_process(data, folder, ratio, process, of, args)
                    results.append(found)
                    print(describe(found))
    if args.json:
        Path(args.json).write_text(json.dumps({"goals": GOALS, "results": results}, indent=2) + "\n")


def describe(found: dict[str, Any]) -> str:
    read = "" if found["read_of_shard"] is None else f", images read: {found['read_of_shard']:.3f} of its shard"
    return (
        f"{found['kind']} of {found['rows']:,} rows, {found['aspect_ratio']}, process {found['process']} of "
        f"{found['of']}: "
        f"{found['seconds_to_first_batch']:.1f} s to the first batch, {found['gigabytes']:.2f} GB, "
        f"{found['plan_milliseconds_per_conversation']:.3f} ms to plan a conversation{read}"
    )


if __name__ == "__main__":
    main()
