"""Draw images of shapes and generate conversations about them: a small synthetic dataset for experiments.

    python -m train.datasets.shapes --output shapes --examples 20000 --seed 0

    images/             PNG files: train-N.png, test-N.png
    captions.json       stage 1: the number of objects of each size, shape and colour, and their places
    train.json          stage 2: conversations about one training image, two, or none
    test.json           questions about other images, one per row, equally many of each kind
    test_captions.json  captions of the test images
    records.jsonl       captions and boxes of the training images, as `train.datasets.instruct` reads them

The JSON files have the original's format, plus the kind of each question (`kinds`). The same seed writes the same
files.
"""

import argparse
import collections
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.checkpoints.outputs import new_directory
from llava_jax.console import SEED, InputError, Parser, Progress, integer, note, plural, run_main, shorten
from train.datasets.shapes import questions
from train.datasets.shapes.questions import Rng, Turn
from train.datasets.shapes.scenes import Scene, draw, make_scene

ONE_IMAGE, TWO_IMAGES = "<image>\n", "<image>\n<image>\n"
SPLITS = ("train", "test")
CAPITALIZED = 0.75  # share of the questions that begin with a capital letter
QUESTIONS_PER_SCENE = 3  # in the test split
WEIGHTS = {"count": 4, "position": 3}  # how often hard kinds are asked in training, relative to others
SHORT = questions.SHORT | {"members": questions.members}
KINDS = [kind for kind in (*SHORT, "text") for _ in range(WEIGHTS.get(kind, 1))]  # of short training questions
MAX_IMAGES = 10**6  # per split
IMAGE_COUNT = integer(1, MAX_IMAGES)
Row = dict[str, Any]


def rng_for(seed: int, split: str, index: int, stream: int) -> Rng:
    """A separate random generator for each scene and each conversation, so that adding some does not change others."""
    return np.random.default_rng((seed, SPLITS.index(split), index, stream))


def make_scenes(split: str, number: int, seed: int, taken: set[Scene], folder: Path) -> list[Scene]:
    """Generate scenes that are not in `taken`, add them to it, and save their images."""
    scenes, rngs = [], [rng_for(seed, split, i, 0) for i in range(number)]
    with Progress(f"generating {split} scenes", number, "scenes") as bar:
        for rng in rngs:
            while (scene := make_scene(rng)) in taken:
                pass
            taken.add(scene)
            scenes.append(scene)
            bar.advance()

    def save(i: int) -> None:
        draw(scenes[i], rngs[i]).save(folder / file_name(split, i))

    save_each(f"drawing {split} images", save, range(number))
    return scenes


def save_each(task: str, save: Callable[[Any], None], images: Sequence) -> None:
    """Call `save` for each image in threads (the slow parts of Pillow and NumPy release Python's lock)."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with Progress(task, len(images), "images") as bar:
            for _ in pool.map(save, images):
                bar.advance()
    finally:
        pool.shutdown(cancel_futures=True)


def file_name(split: str, index: int) -> str:
    return f"{split}-{index:06}.png"


# ---------------------------------------------------------------- rows


def make_row(rng: Rng, name: str, images: list[str], turns: list[tuple[str, Turn]]) -> Row:
    """A row in the original's format; `turns` are kinds, questions and answers. Most questions are capitalized."""
    image_tokens = TWO_IMAGES if len(images) == 2 else ONE_IMAGE if images else ""
    conversation = []
    for i, (_, (question, answer)) in enumerate(turns):
        if rng.random() < CAPITALIZED:
            question = "? ".join(part[0].upper() + part[1:] for part in question.split("? "))
        conversation += [
            {"from": "human", "value": (image_tokens if i == 0 else "") + question},
            {"from": "gpt", "value": answer},
        ]
    image = {"image": images if len(images) > 1 else images[0]} if images else {}
    return {"id": name} | image | {"kinds": [kind for kind, _ in turns], "conversations": conversation}


def caption_rows(split: str, scenes: list[Scene], seed: int) -> list[Row]:
    rows = []
    for i, scene in enumerate(scenes):
        rng = rng_for(seed, split, i, 1)
        turns = [("caption", questions.caption(rng, scene))]
        rows.append(make_row(rng, f"{split}-{i}", [file_name(split, i)], turns))
    return rows


def train_rows(scenes: list[Scene], seed: int) -> list[Row]:
    """One conversation per scene, of the three kinds of LLaVA's instruction data, one in five with a second image; and
    one without an image per twenty scenes."""
    rows = []
    for i, scene in enumerate(scenes):
        rng = rng_for(seed, "train", i, 1)
        images = [file_name("train", i)]
        kind = rng.choice(["conversation", "detail", "reasoning", "two"], p=[0.15, 0.15, 0.5, 0.2])
        turns: list[tuple[str, Turn]] = []
        if kind == "two" and len(scenes) > 1:
            other = int(rng.integers(len(scenes) - 1))
            other += other >= i
            images.append(file_name("train", other))
            turns = ask_about_two(rng, scene, scenes[other], int(rng.integers(8, 12)))
        if kind == "detail":
            name, describe = questions.pick(rng, [("detail", questions.detail), ("description", questions.description)])
            turns = [(name, describe(rng, scene))]
        if kind == "reasoning":
            found = [questions.reasoning(rng, scene) for _ in range(10)]
            turns = [("reasoning", turn) for turn in dict.fromkeys(filter(None, found))][:5]
        if len(images) == 1:  # long answers first or last, so that they do not always follow from earlier ones
            short = ask(rng, scene, int(rng.integers(12, 18)) - 2 * len(turns))
            turns = turns + short if rng.random() < 0.5 else short + turns
        rows.append(make_row(rng, f"train-{i}", images, turns))
    for i in range(0, len(scenes), 20):
        rng = rng_for(seed, "train", i, 2)
        texts = dict.fromkeys(questions.text(rng) for _ in range(6))
        rows.append(make_row(rng, f"train-text-{i}", [], [("text", turn) for turn in texts]))
    return rows


def ask(rng: Rng, scene: Scene, number: int) -> list[tuple[str, Turn]]:
    """Short questions of all kinds about an image, including a few without an image."""
    asked: dict[str, tuple[str, Turn]] = {}
    while len(asked) < number:
        kind = questions.pick(rng, KINDS)
        turn = questions.text(rng) if kind == "text" else SHORT[kind](rng, scene)
        if turn:
            asked.setdefault(turn[0], (kind, turn))
    return list(asked.values())


def ask_about_two(rng: Rng, first: Scene, second: Scene, number: int) -> list[tuple[str, Turn]]:
    asked: dict[str, tuple[str, Turn]] = {}
    for _ in range(4 * number):
        turn = questions.two_images(rng, first, second)
        if turn and len(asked) < number:
            asked.setdefault(turn[0], ("two", turn))
    return list(asked.values())


def question_rows(scenes: list[Scene], seed: int) -> list[Row]:
    """`QUESTIONS_PER_SCENE` questions per scene, of the least frequent kinds so far."""
    rows, asked = [], collections.Counter(dict.fromkeys([*questions.SHORT, "reasoning", "two", "text"], 0))
    for i, scene in enumerate(scenes):
        rng, found = rng_for(seed, "test", i, 1), 0
        for kind, _ in reversed(asked.most_common()):
            images = [file_name("test", i)]
            turn: Turn | None
            if kind == "text":
                turn, images = questions.text(rng), []
            elif kind == "two":
                images.append(file_name("test", i - 1 if i else len(scenes) - 1))
                turn = questions.two_images(rng, scene, scenes[i - 1])
            else:
                turn = (questions.SHORT | {"reasoning": questions.reasoning})[kind](rng, scene)
            if turn and found < QUESTIONS_PER_SCENE:
                rows.append(make_row(rng, f"test-{i}-{kind}", images, [(kind, turn)]))
                asked[kind] += 1
                found += 1
    return rows


def records(split: str, scenes: list[Scene], seed: int) -> list[Row]:
    """Captions of each image as by several people, and the boxes of its objects, as in COCO (`coco.read_records`)."""
    rows = []
    for i, scene in enumerate(scenes):
        rng = rng_for(seed, split, i, 6)
        things = [questions.described(thing) for thing in scene.things]
        captions = [f"{questions.listed(things)} on a {scene.background} background."]
        captions += [f"There is {questions.listed(list(rng.permutation(things)))}." for _ in range(2)]
        captions += [f"The image shows {plural(len(things), 'object')}.", f"You see {questions.placed(scene)}."]
        sides = (scene.width, scene.height, scene.width, scene.height)
        instances = [
            {
                "category": f"{thing.size} {thing.name}",
                "bbox": [round(a / b, 3) for a, b in zip(thing.box, sides, strict=True)],
            }
            for thing in scene.things
        ]
        name = file_name(split, i)
        rows.append({"id": f"{split}-{i}", "image": name, "captions": captions, "instances": instances})
    return rows


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m train.datasets.shapes", description="Draw images of shapes, and generate questions.")
    p.add_argument("--output", required=True, metavar="DIR", help="a new directory")
    p.add_argument(
        "--examples", type=IMAGE_COUNT, required=True, metavar="N", help=f"training images, at most {MAX_IMAGES:,}"
    )
    p.add_argument(
        "--test-examples", type=IMAGE_COUNT, metavar="N", help="test images (default: a tenth of --examples)"
    )
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="(default 0)")
    return p


def main() -> None:
    args = parser().parse_args()
    if "://" in args.output:
        raise InputError(
            f"--output {shorten(args.output)}: must be a local directory, since training reads images from it"
        )
    tests = max(1, args.examples // 10) if args.test_examples is None else args.test_examples
    write(Path(args.output), args.examples, tests, args.seed)


def write(output: Path, examples: int, tests: int, seed: int) -> None:
    """Write a dataset.

    Raises:
      InputError: the directory is not empty, or cannot be written.
    """
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {shorten(output)}: is not empty; give a new directory")
    with new_directory(output, overwrite=output.is_dir()) as staged:
        images = Path(staged / "images")
        images.mkdir()
        taken: set[Scene] = set()
        scenes = {
            split: make_scenes(split, number, seed, taken, images)
            for split, number in (("train", examples), ("test", tests))
        }
        files = {
            "captions.json": caption_rows("train", scenes["train"], seed),
            "train.json": train_rows(scenes["train"], seed),
            "test.json": question_rows(scenes["test"], seed),
            "test_captions.json": caption_rows("test", scenes["test"], seed),
        }
        for name, rows in files.items():
            (staged / name).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        lines = (json.dumps(record) + "\n" for record in records("train", scenes["train"], seed))
        (staged / "records.jsonl").write_text("".join(lines))
    asked = collections.Counter(kind for row in files["test.json"] for kind in row["kinds"])
    note(
        f"{examples:,} training images with {len(files['train.json']):,} conversations, {tests:,} test images with "
        f"{len(files['test.json']):,} questions ({', '.join(f'{n} {kind}' for kind, n in asked.items())}), in {output}"
    )


if __name__ == "__main__":
    run_main(main)
