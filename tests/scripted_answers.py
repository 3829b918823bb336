"""An engine that answers by a function, for what asks many questions: no model, no device."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from llava_jax.console import InputError
from llava_jax.data.templates import get_template


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    token_ids: tuple[int, ...] = (1, 2, 3)


class ScriptedEngine:
    """Answers in reverse order, like an engine whose last questions are short; a missing image fails its question.

    Attributes:
      asked: the requests so far.
    """

    template, template_name = get_template("v1"), "v1"
    context = 512
    params = np.zeros(1, np.float32)
    mesh = SimpleNamespace(shape={"data": 1}, devices=np.array([SimpleNamespace(device_kind="scripted")]))

    def __init__(self, answer: Callable[[str], str] = lambda question: f" {len(question)} ", delay: float = 0):
        self.answer, self.delay, self.asked = answer, delay, []

    def generate(self, requests, sampling, *, rows):
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            time.sleep(self.delay)
            missing = [image for image in request.images if not isinstance(image, bytes) and not Path(image).exists()]
            failed = InputError(f"{request.name}: {missing[0]}: no such image") if missing else None
            yield i, failed or Reply(self.answer(request.turns[-1]))


def write_conversations(folder: Path, rows: int = 10, images: int = 4) -> Path:
    """A file of conversations of one question each, with the right answers of a `ScriptedEngine` but for every third,
    about some images in `folder/images`."""
    (folder / "images").mkdir(parents=True)
    for i in range(images):
        Image.new("RGB", (20 + i, 20), (40 * i, 0, 90)).save(folder / "images" / f"{i}.png")
    path, data = folder / "test.json", []
    for i in range(rows):
        question = "<image>\n" + "what is it? " * i + "?"
        right = "wrong" if i % 3 == 0 else str(len(question))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": right}]
        data.append({"image": f"{i % images}.png", "kinds": [f"kind {i % 2}"], "conversations": turns})
    path.write_text(json.dumps(data))
    return path
