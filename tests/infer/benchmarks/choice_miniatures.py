"""Miniatures of benchmarks: ten questions of our own in the files that each publishes, with small images."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import vqa_miniatures
from infer.benchmarks import find_benchmark
from infer.benchmarks.benchmark import Answer
from llava_jax.console import InputError

SUBJECTS = ("natural science", "social science", "language science")
SHAPES = ("a red circle", "a blue square", "a green triangle", "a yellow star", "a black line")
LETTERS = "ABCDE"


def image_bytes(number: int, side: int = 16) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side + number, side), (25 * number % 256, 60, 200)).save(data, "PNG")
    return data.getvalue()


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(number))


def write_all(root: Path) -> Path:
    """The files of all benchmarks, those of `vqa_miniatures` too."""
    for name in ("textvqa", "vqav2", "vqav2-val", "vizwiz", "vizwiz-val", "gqa", "pope", "mme"):
        vqa_miniatures.write(name, root)
    for name in ("mmbench", "mmbench-cn"):
        benchmark = find_benchmark(name)
        write_tsv(root / (benchmark.directory or name) / benchmark.table.path, mmbench_rows())
    write_scienceqa(root / "scienceqa")
    write_seed(root / "seed_bench")
    write_llava_bench(root / "llava-bench-in-the-wild")
    write_mm_vet(root / "mm-vet")
    return root


def answers_of(benchmark, directory: Path, texts, protocol: str | None = None) -> list[Answer]:
    """Answers to all questions of a benchmark, as a run writes them."""
    questions = benchmark.questions(directory, protocol or benchmark.protocols[0])
    return [
        Answer(question.id, question.prompt, text, question.extra, number)
        for number, (question, text) in enumerate(zip(questions, texts, strict=True), 1)
    ]


# ---------------------------------------------------------------- ScienceQA


def write_scienceqa(directory: Path) -> Path:
    """Question i has i % 4 + 2 choices, and the answer i % 2; the even ones have an image, every third a hint."""
    problems = {}
    for i in range(10):
        problems[str(i + 1)] = {
            "question": f"Which  one is number {i}?",
            "choices": list(SHAPES[: i % 4 + 2]),
            "answer": i % 2,
            "hint": "" if i % 3 else f"Hint {i}.",
            "image": None if i % 2 else "image.png",
            "task": "closed choice",
            "grade": f"grade{i + 1}",
            "subject": SUBJECTS[i % 3],
            "topic": "shapes",
            "category": "Shapes",
            "skill": "Name shapes",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        if not i % 2:
            write_image(directory / "images/test" / str(i + 1) / "image.png", i)
    problems["99"] = {"split": "train"}
    write_json(directory / "problems.json", problems)
    write_json(directory / "pid_splits.json", {"train": ["99"], "test": [str(i + 1) for i in range(10)]})
    return directory


# ---------------------------------------------------------------- MMBench

COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip


def mmbench_rows(rotations: bool = True) -> list[dict[str, str]]:
    """Four questions about two categories; the first three have rotations too, as in the published file: ten rows."""
    rows = []
    for i, n in enumerate((4, 3, 2, 2)):
        options = list(SHAPES[:n])
        for k in range(n if rotations and i < 3 else 1):
            shown = options[k:] + options[:k]
            row = dict.fromkeys(COLUMNS, "")
            row |= dict(zip("ABCD", shown, strict=False))
            row |= {
                "index": str(10 + i + k * 1_000_000),
                "question": f"What is in image {i}?",
                "hint": "" if i else 'Read "this"\tfirst',
                "answer": LETTERS[shown.index(options[i % 2])],
                "category": ("shape", "color")[i % 2],
                "image": base64.b64encode(image_bytes(i)).decode(),
                "source": "own",
                "l2-category": "perception",
                "split": "dev",
            }
            rows.append(row)
    return rows


def write_tsv(path: Path, rows: list[dict[str, str]], columns=COLUMNS) -> Path:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if set(value) & set('"\t\n') else value

    lines = ["\t".join(columns), *("\t".join(quoted(row[name]) for name in columns) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path.parent


# ---------------------------------------------------------------- SEED-Bench


def write_seed(directory: Path) -> Path:
    """Ten questions of three types, the last three about videos."""
    types = {"Scene Understanding": 1, "Instance Counting": 5, "Action Recognition": 10}
    annotations, rows = [], []
    for i in range(10):
        data_type = "image" if i < 7 else "video"
        choices = {f"choice_{letter.lower()}": SHAPES[k] for k, letter in enumerate("ABCD")}
        annotations.append(
            {
                "answer": "ABCD"[i % 4],
                **choices,
                "data_id": f"{i}_x",
                "data_type": data_type,
                "question": f"What is in image {i}?",
                "question_id": str(100 + i),
                "question_type_id": 10 if i > 6 else (1, 5)[i % 2],
                "segment": None,
            }
        )
        name = f"SEED-Bench-{'image' if i < 7 else 'video-image'}/{i}_x"
        write_image(directory / name, i)
        options = "".join(f"{letter}. {SHAPES[k]}\n" for k, letter in enumerate("ABCD"))
        text = f"What is in image {i}?\n{options}Answer with the option's letter from the given choices directly."
        rows.append({"image": name, "text": text, "category": "x", "question_id": 100 + i})
    write_json(directory / "SEED-Bench.json", {"questions": annotations, "question_type": types})
    write_lines(directory / "llava-seed-bench.jsonl", rows)
    return directory


# ---------------------------------------------------------------- LLaVA-Bench and MM-Vet


def write_llava_bench(directory: Path) -> Path:
    rows, contexts, gpt4 = [], [], []
    for i in range(10):
        name = f"{i // 2 + 1:03}.png"
        write_image(directory / "images" / name, i // 2)
        kind = ("conv", "detail", "complex")[i % 3]
        rows.append({"question_id": i, "image": name, "category": kind, "text": f"What about {i}?"})
        gpt4.append({"question_id": i, "prompt": f"What about {i}?", "text": f"It is {i}.", "answer_id": f"gpt4-{i}"})
        if not i % 2:
            caption = f"Image {i // 2} shows {SHAPES[i // 2]}."
            contexts.append({"id": str(i), "image": name, "caption": [caption, "Nothing else."] if i else caption})
    write_lines(directory / "questions.jsonl", rows)
    write_lines(directory / "context.jsonl", contexts)
    write_lines(directory / "answers_gpt4.jsonl", gpt4)
    return directory


CAPABILITIES = (["rec"], ["ocr", "spat"], ["math", "ocr", "spat"], ["gen", "know", "rec"])


def write_mm_vet(directory: Path, with_question_file: bool = True) -> Path:
    annotations = {}
    for i in range(10):
        write_image(directory / "images" / f"v1_{i}.png", i)
        annotations[f"v1_{i}"] = {
            "imagename": f"v1_{i}.png",
            "imagesource": "own",
            "question": f"What is number {i}?",
            "answer": f"{i}<AND>{i + 1}" if i % 2 else f"{i}<OR>{i} or so",
            "capability": CAPABILITIES[i % 4],
        }
    write_json(directory / "mm-vet.json", annotations)
    rows = [{"question_id": i, "image": f"v1_{i}.png", "text": f"What is number {i}?"} for i in range(10)]
    if with_question_file:
        write_lines(directory / "llava-mm-vet.jsonl", rows)
    return directory


# ---------------------------------------------------------------- damage

DAMAGE = {
    "missing": None,
    "a directory": "a directory",
    "empty": b"",
    "blank": b"\n \r\n",
    "not JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "null": b"null",
    "another type": b'"text"',
    "a list of numbers": b"[1]",
    "NaN": b'{"questions": NaN, "question_id": NaN}',
    "nested deeply": b"[" * 100_000,
    "an empty object": b"{}",
}


def assert_named(path: Path, damage: str, *reads) -> None:
    """Damage a file, and read it: one line that names it, by each of the functions."""
    path.unlink(missing_ok=True)
    if damage == "a directory":
        path.mkdir()
    elif DAMAGE[damage] is not None:
        path.write_bytes(DAMAGE[damage])
    for read in reads:
        with pytest.raises(InputError) as error:
            read()
        assert path.name in str(error.value), error.value
        assert "\n" not in str(error.value)
