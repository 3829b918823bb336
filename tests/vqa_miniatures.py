"""Miniatures of the files of TextVQA, VQAv2, VizWiz, GQA, POPE and MME: the real files' layout and schema, ten rows
each, about five images of a square.

`write(name, root)` writes those of a benchmark, images included, and returns its directory; `answers_to` makes answers.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from infer.benchmarks.benchmark import Answer, Question

SUFFIX = "\nAnswer the question using a single word or phrase."
COLORS = ["red", "green", "blue", "yellow", "purple"]  # of the square in each image
QUESTIONS = [
    (i, *asked)
    for i, color in enumerate(COLORS)
    for asked in (("what color is the square?", color), (f"is the square {COLORS[i // 2]}?", "no" if i else "yes"))
]  # image, question, right answer


def answers_to(questions: Sequence[Question], texts: Sequence[str]) -> list[Answer]:
    """One answer to each question; a text of None leaves a question out."""
    pairs = [(one, text) for one, text in zip(questions, texts, strict=True) if text is not None]
    return [Answer(one.id, one.prompt, text, line=line) for line, (one, text) in enumerate(pairs, 1)]


def ten(right: str, other: str = "square", agree: int = 8) -> list[str]:
    """The answers of ten people, of whom some agree."""
    return [right] * agree + [other] * (10 - agree)


def write(name: str, root: Path) -> Path:
    """Write a benchmark's files below `root`, which is then the directory of all benchmarks."""
    directory = root / ("MME" if name == "mme" else name.removesuffix("-val"))
    _WRITERS[name](directory)
    return directory


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _draw(folder: Path, names: Sequence[str]) -> None:
    for name, color in zip(names, COLORS, strict=True):
        image = Image.new("RGB", (48, 40), "white")
        ImageDraw.Draw(image).rectangle((8, 8, 30, 30), fill=color)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


def _question_line(id, image: str, question: str, suffix: str = SUFFIX, category: str = "default") -> dict:
    return {"question_id": id, "image": image, "text": question.capitalize() + suffix, "category": category}


def _textvqa(directory: Path) -> None:
    ids = [f"{i:016x}" for i in range(5)]
    tokens = f"\nReference OCR token: SQUARE, No., 5{SUFFIX}"
    write_lines(
        directory / "llava_textvqa_val_v051_ocr.jsonl",
        [_question_line(ids[i], f"{ids[i]}.jpg", question, tokens) for i, question, _ in QUESTIONS],
    )
    data = [
        {
            "question": question, "question_id": 34602 + n, "image_id": ids[i], "answers": ten(right),
            "question_tokens": question.rstrip("?").split(), "image_classes": ["Square"], "image_width": 48,
            "image_height": 40, "flickr_original_url": "", "flickr_300k_url": "", "set_name": "val",
        }
        for n, (i, question, right) in enumerate(QUESTIONS)
    ]  # fmt: skip
    info = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    write_json(directory / "TextVQA_0.5.1_val.json", info)
    _draw(directory / "train_images", [f"{id}.jpg" for id in ids])


def _vqav2(directory: Path) -> None:
    names = [f"COCO_test2015_{i:012}.jpg" for i in range(5)]
    rows = [_question_line(1000 * i + n, names[i], question) for n, (i, question, _) in enumerate(QUESTIONS)]
    further = [{"question_id": 9000 + n, "image": names[n], "text": f"Why?{SUFFIX}"} for n in range(2)]
    write_lines(directory / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    write_lines(directory / "llava_vqav2_mscoco_test2015.jsonl", further[:1] + rows + further[1:])
    _draw(directory / "test2015", names)


def _people(right: str) -> list[dict]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(ten(right), 1)]


def _vqav2_val(directory: Path) -> None:
    header = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014", "license": {"name": "CC"}}
    ids = [262148000 + n for n in range(10)]
    questions = [
        {"image_id": 262148 + i, "question": question.capitalize(), "question_id": id}
        for id, (i, question, _) in zip(ids, QUESTIONS, strict=True)
    ]
    task = header | {"task_type": "Open-Ended", "questions": questions}
    write_json(directory / "v2_OpenEnded_mscoco_val2014_questions.json", task)
    annotations = [
        {
            "question_type": " ".join(question.split()[:2]), "multiple_choice_answer": right, "answers": _people(right),
            "image_id": 262148 + i, "answer_type": "yes/no" if right in ("yes", "no") else "other", "question_id": id,
        }
        for id, (i, question, right) in zip(ids, QUESTIONS, strict=True)
    ]  # fmt: skip
    write_json(directory / "v2_mscoco_val2014_annotations.json", header | {"annotations": annotations})
    _draw(directory / "val2014", [f"COCO_val2014_{262148 + i:012}.jpg" for i in range(5)])


def _vizwiz(directory: Path) -> None:
    suffix = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SUFFIX}"
    names = [f"VizWiz_test_{i:08}.jpg" for i in range(10)]
    write_lines(
        directory / "llava_test.jsonl",
        [_question_line(n, names[n], question, suffix) for n, (_, question, _) in enumerate(QUESTIONS)],
    )
    _draw(directory / "test", names[:5])
    _draw(directory / "test", names[5:])


def _vizwiz_val(directory: Path) -> None:
    names = [f"VizWiz_val_{i:08}.jpg" for i in range(10)]
    rows = [
        {
            "image": names[n], "question": question, "answerable": 1,
            "answer_type": "yes/no" if right in ("yes", "no") else "other",
            "answers": [{"answer": text, "answer_confidence": "yes"} for text in ten(right)],
        }
        for n, (_, question, right) in enumerate(QUESTIONS)
    ]  # fmt: skip
    write_json(directory / "val.json", rows)
    _draw(directory / "val", names[:5])
    _draw(directory / "val", names[5:])


def _gqa(directory: Path) -> None:
    ids = [f"20{n:07}" for n in range(10)]
    rows = zip(ids, QUESTIONS, strict=True)
    lines = [_question_line(id, f"n{i}.jpg", question) for id, (i, question, _) in rows]
    write_lines(directory / "llava_gqa_testdev_balanced.jsonl", lines)
    annotations = {
        id: {
            "question": question.capitalize(), "answer": right, "fullAnswer": f"It is {right}.", "imageId": f"n{i}",
            "isBalanced": True, "groups": {"global": None, "local": "1"}, "equivalent": [id], "semantic": [],
            "types": {
                "structural": "verify" if right in ("yes", "no") else "query", "semantic": "attr", "detailed": "color"
            },
        }
        for id, (i, question, right) in zip(ids, QUESTIONS, strict=True)
    }  # fmt: skip
    write_json(directory / "data/testdev_balanced_questions.json", annotations)
    _draw(directory / "data/images", [f"n{i}.jpg" for i in range(5)])


POPE_ROWS = [
    (category, i, color, "yes" if color == COLORS[i] else "no")
    for category, pairs in {
        "random": [(0, "red"), (0, "blue"), (1, "green"), (1, "red")],
        "popular": [(0, "red"), (2, "green"), (2, "blue")],
        "adversarial": [(3, "yellow"), (4, "blue"), (4, "purple")],
    }.items()
    for i, color in pairs
]


def _pope(directory: Path) -> None:
    names = [f"COCO_val2014_{i:012}.jpg" for i in range(5)]
    lines = []
    for category in ("adversarial", "popular", "random"):  # as in the real question file
        rows = [
            (i, f"Is there a {color} square in the image?", label) for c, i, color, label in POPE_ROWS if c == category
        ]
        lines += [
            {"question_id": len(lines) + n, "image": names[i], "text": question + SUFFIX, "category": category}
            for n, (i, question, _) in enumerate(rows, 1)
        ]
        labels = [
            {"question_id": n, "image": names[i], "text": question, "label": label}
            for n, (i, question, label) in enumerate(rows, 1)
        ]
        write_lines(directory / f"coco/coco_pope_{category}.json", labels)
    write_lines(directory / "llava_pope_test.jsonl", lines)
    _draw(directory / "val2014", names)


MME_IMAGES = [
    "existence/000000000001.jpg", "existence/000000000002.jpg", "color/000000000003.jpg",
    "posters/images/tt0000001.jpg", "code_reasoning/0001.png",
]  # fmt: skip


def _mme(directory: Path) -> None:
    release = directory / "MME_Benchmark_release_version"
    lines = []
    for name, color in zip(MME_IMAGES, COLORS, strict=True):
        asked = [(f"Is there a {color} square in this image?", "Yes"), ("Is there a black square in this image?", "No")]
        image = Path(name)
        texts = release / str(image.parent).replace("images", "questions_answers_YN")
        texts.mkdir(parents=True, exist_ok=True)
        rows = [f"{question} Please answer yes or no.\t{right}\n" for question, right in asked]
        (texts / f"{image.stem}.txt").write_text("".join(rows))
        lines += [
            {"question_id": name, "image": name, "text": question + SUFFIX, "category": name.split("/")[0]}
            for question, _ in asked
        ]
    write_lines(directory / "llava_mme.jsonl", lines)
    _draw(release, MME_IMAGES)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "vqav2-val": _vqav2_val,
    "vizwiz": _vizwiz,
    "vizwiz-val": _vizwiz_val,
    "gqa": _gqa,
    "pope": _pope,
    "mme": _mme,
}
