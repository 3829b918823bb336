"""The inputs of `fuzz.py`: valid files of each format, and random changes to them."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
BASE = Path("../../base")  # the output of `make`, relative to the current directory of an attempt


def make(base: Path) -> None:
    """Write valid checkpoints and images of each format, and files of data, questions and answers."""
    from safetensors.numpy import load_file, save_file

    from convert.to_hf import to_hf
    from convert.to_orbax import to_orbax
    from train.lora import _save_torch

    base.mkdir(parents=True)
    for name, golden in (("original", "v1.6-mistral"), ("v1.5", "v1.5-llama")):
        shutil.copytree(GOLDEN / "checkpoints" / golden, base / name, ignore=shutil.ignore_patterns("expected*"))
    to_hf(base / "original", base / "transformers")
    to_orbax(base / "v1.5", base / "orbax")
    shutil.copytree(base / "v1.5", base / "bin")
    tensors = load_file(base / "v1.5" / "model.safetensors")
    _save_torch(base / "bin" / "pytorch_model.bin", tensors)
    (base / "bin" / "model.safetensors").unlink()
    shutil.copytree(GOLDEN / "tokenizers", base / "tokenizers", ignore=shutil.ignore_patterns("*.py", "*.gz", "str*"))

    adapter, name = base / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    out, wide = tensors[f"{name}.weight"].shape
    factors = {"A": np.ones((4, wide), np.float32), "B": np.ones((out, 4), np.float32)}
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": x for side, x in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = dict(
        peft_type="LORA", r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], bias="none",
        rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.0\..*": 16},
    )  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))

    images = base / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "eps", "pdf"):
        image.save(images / f"rgb.{kind}")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(images / "16.png")
    image.convert("P").save(images / "palette.png")
    image.convert("CMYK").save(
        images / "cmyk.jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    )
    image.save(images / "frames.gif", save_all=True, append_images=[image.rotate(90)])

    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    question = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    messages = [question, {"role": "assistant", "content": "So."}]
    rows = [{"id": str(i), "image": "images/rgb.png", "conversations": turns} for i in range(4)]
    rows += [{"id": 4, "messages": messages, "system": "Be brief."}, {"id": "5", "conversations": turns[:1] * 2}]
    rows[2] |= {"image": ["images/rgb.png"], "kinds": ["animal"]}
    problem = dict(question="Which?", choices=["cat", "dog"], answer=0, hint="", image=None, lecture="", solution="")
    coco = {"images": [{"id": i, "file_name": "images/rgb.png"} for i in range(2)]}
    coco["annotations"] = [{"id": i, "image_id": i, "caption": "A cat."} for i in range(2)]
    asked = [{"question_id": i, "text": "What is it?", "image": "images/rgb.png"} for i in range(3)]
    answered = [{"question_id": 0, "prompt": "What is it?", "text": "A cat.", "answer_id": "a", "metadata": {}}]
    records = [
        {
            "id": i,
            "image": "images/rgb.png",
            "captions": ["A cat."],
            "instances": [{"category": "cat", "bbox": [0, 0, 1, 1]}],
        }
        for i in range(3)
    ]
    choices = [{"message": {"content": "A cat."}, "finish_reason": "stop"}]
    results = [
        {"custom_id": f"{i}/detail/0/1", "response": {"status_code": 200, "body": {"choices": choices}}, "error": None}
        for i in range(3)
    ]
    files = {
        "data.json": json.dumps(rows),
        "data.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "train.json": json.dumps(rows[:2]),
        "mix.yaml": "datasets:\n  - json_path: data.json\n    sampling_strategy: first:50%\n",
        "questions.jsonl": "".join(json.dumps(row) + "\n" for row in asked),
        "answers.jsonl": "".join(json.dumps(row) + "\n" for row in answered),
        "metrics.jsonl": "".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in (1, 2, 3)),
        "coco_captions.json": json.dumps(
            {
                "images": [{"id": i, "file_name": "images/rgb.png", "width": 64, "height": 48} for i in range(3)],
                "annotations": [{"image_id": i % 3, "caption": "A cat on a mat."} for i in range(9)],
            }
        ),
        "coco_instances.json": json.dumps(
            {
                "images": [{"id": i, "file_name": "images/rgb.png", "width": 64, "height": 48} for i in range(3)],
                "annotations": [
                    {"image_id": i, "category_id": 1, "bbox": [1, 2.5, 9, 9], "iscrowd": 0} for i in range(3)
                ],
                "categories": [{"id": 1, "name": "cat"}],
            }
        ),
        "records.jsonl": "".join(json.dumps(line) + "\n" for line in records),
        "replies.jsonl": "".join(f'{{"id":"{i}/detail/0/1","text":"A cat."}}\n' for i in range(3)),
        "results.jsonl": "".join(json.dumps(line) + "\n" for line in results),
        "problems.json": json.dumps({str(i): problem for i in range(3)}),
        "captions.jsonl": "".join(
            json.dumps({"image": "images/rgb.png", "caption": f"A {i}."}) + "\n" for i in range(3)
        ),
        "captions.csv": "image,caption\nimages/rgb.png,A\n" + 'images/16.png,"A ""b"",\nc"\n' * 3,
        "captions.tsv": "A cat\timages/rgb.png\n" * 3,
        "coco.json": json.dumps(coco),
        "pid_splits.json": json.dumps({"train": ["0", "1"], "test": ["2"]}),
    }
    for file, text in files.items():
        (base / file).write_text(text)
    sys.path += [str(TESTS), str(TESTS / "infer" / "benchmarks")]
    from choice_miniatures import write_all

    write_all(base / "eval")
    with tarfile.open(base / "captions.tar", "w") as tar:
        for i in range(3):
            tar.add(images / "rgb.png", f"{i}.png")
            tar.add(base / ("questions.jsonl" if i else "pid_splits.json"), f"{i}.{'txt' if i else 'json'}")
    command = [sys.executable, "-m", "train.datasets.prepare", "--data", "train.json", "--output", "prepared"]
    more = ["--workers", "1", "--checkpoint", "v1.5", "--template", "v1"]
    subprocess.run([*command, *more], cwd=base, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def fetch_inputs(*names: str) -> None:
    """Copy inputs that `make` wrote to the current directory."""
    for name in names:
        (shutil.copytree if (BASE / name).is_dir() else shutil.copy)(BASE / name, name)


# ---------------------------------------------------------------- changes

TEXTS = ("", "x", "0", "-1", "None", "x" * 5000, "\ud800", "\x1b[31m\n", "\0", "/", "..", "<image>", "猫", "(.*.*)*x")
NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(2**70), 10**400)
VALUES = (None, True, False, [], {}, [None], [[[1]]], {"a": {}}, [1, 2], ["x"] * 1000, *TEXTS, *NUMBERS)


def nested_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values nested in a JSON value."""
    for key in value if isinstance(value, dict) else range(min(len(value), 50)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from nested_paths(value[key], (*path, key))


def mutate(value: Any, pick: random.Random) -> Any:
    """Change one nested value of a JSON value."""
    found = list(nested_paths(value))
    if not found or pick.random() < 0.02:
        return pick.choice(VALUES)
    *path, key = pick.choice(found)
    holder = value
    for step in path:
        holder = holder[step]
    match pick.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]] * pick.choice([0, 1, 2, 1000])
        case 2 if isinstance(holder, dict):
            holder[pick.choice(TEXTS)] = holder.pop(key)
        case 3 if isinstance(holder[key], int | float):
            holder[key] = pick.choice([-holder[key], holder[key] * 10**6, holder[key] + 1, str(holder[key])])
        case 4 if isinstance(holder[key], str):
            holder[key] += pick.choice(TEXTS)
        case _:
            holder[key] = pick.choice(VALUES)
    return value


def damage(data: bytes, pick: random.Random) -> bytes:
    """Change, insert or delete some bytes."""
    data = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at = pick.randrange(len(data) or 1) if pick.random() < 0.5 else pick.randrange(min(len(data), 256) or 1)
        match pick.randrange(6):
            case 0:
                data[at:at] = pick.randbytes(pick.randrange(9))
            case 1:
                del data[at : at + pick.choice([1, 8, len(data)])]
            case 2:
                data[at : at + 4] = pick.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
            case _:
                data[at : at + 1] = pick.randbytes(1)
    return bytes(data)


def change(path: Path, pick: random.Random) -> None:
    """Change a file: its JSON, its bytes, or its type."""
    chance, text = pick.random(), path.suffix in (".json", ".jsonl")
    if chance < 0.02:
        path.unlink()
        made = pick.randrange(4)
        if made == 0:
            os.mkfifo(path)
        elif made == 1:
            path.mkdir()
        elif made == 2:
            path.symlink_to(pick.choice(["/dev/zero", "nowhere", path.name]))
    elif text and chance < 0.85:
        whole = path.read_text()
        lines = whole.splitlines() if "}\n{" in whole else [whole]
        for _ in range(pick.choice([1, 1, 1, 3])):
            at = pick.randrange(len(lines))
            lines[at] = json.dumps(mutate(json.loads(lines[at]), pick), ensure_ascii=pick.random() < 0.5)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif text and chance < 0.9:
        data = path.read_text()
        others = ("[" * 10**5, '{"a":' * 5000, "1" * 5000, "\ufeff" + data, " " * 5000 + data, data + data, "")
        path.write_text(pick.choice(others), encoding=pick.choice(["utf-8", "utf-8", "utf-16"]))
    else:
        path.write_bytes(damage(path.read_bytes(), pick))


def change_one(directory: str, pick: random.Random, suffixes: tuple[str, ...]) -> None:
    found = sorted(path for path in Path(directory).rglob("*") if path.suffix in suffixes and path.is_file())
    change(pick.choice(found), pick)
