"""The model of examples/vlmevalkit, with the bundled checkpoint and the part of VLMEvalKit's `BaseModel` that it needs:
VLMEvalKit has no package of its own.
"""

import sys
from types import ModuleType

import numpy as np
import pytest

from helpers import ROOT, one_device
from infer.generate import BUNDLED
from llava_jax.console import InputError
from train.datasets.shapes.scenes import draw, make_scene

QUESTION = "How many circles are there?"


class BaseModel:
    """vlmeval/vlm/base.py, for messages that are lists of parts already."""

    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(message, dataset)


@pytest.fixture(scope="module")
def model():
    modules = {
        "vlmeval.vlm.base": dict(BaseModel=BaseModel),
        "vlmeval.dataset": dict(DATASET_TYPE=lambda name: "MCQ" if "MMBench" in name else "Y/N"),
        "vlmeval.smp": dict(cn_string=lambda text: any("\u4e00" <= c <= "\u9fff" for c in text)),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vlmeval", "vlmeval.vlm", *modules):
            patch.setitem(sys.modules, name, ModuleType(name))
            vars(sys.modules[name]).update(modules.get(name, {}))
        patch.syspath_prepend(ROOT / "examples" / "vlmevalkit")
        from llava_jax_vlm import LlavaJax

        yield LlavaJax(str(BUNDLED), mesh=one_device(), max_new_tokens=8)
        del sys.modules["llava_jax_vlm"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{i}.png") for i in range(2)]
    for path in paths:
        draw(make_scene(rng), rng).resize((60, 60)).save(path)  # one size, and so one program
    return paths


def text(value):
    return {"type": "text", "value": value}


def image(value):
    return {"type": "image", "value": value}


def test_answers_are_the_engines(model, files):
    for message, question in (
        ([image(files[0]), text(QUESTION)], QUESTION),
        ([text(QUESTION), image(files[0])], QUESTION),  # as LLaVA was trained
        ([image(files[0]), image(files[1]), text("Which has more?")], "Which has more?"),
        ([text("Of"), image(files[0]), text("or"), image(files[1])], "Of\n<image>\nor\n<image>"),
        ([text("What is 2 plus 1?")], "What is 2 plus 1?"),
    ):
        paths = [part["value"] for part in message if part["type"] == "image"]
        answer = model.generate(message, dataset="POPE")
        assert answer and answer == model.engine.ask(question, paths, max_new_tokens=8).text


def test_conversations(model, files):
    utterances = [
        {"role": "user", "content": [image(files[0]), text(QUESTION)]},
        {"role": "assistant", "content": [text("Two.")]},
        {"role": "user", "content": [text("What colour are they?")]},
    ]
    turns = (QUESTION, "Two.", "What colour are they?")
    assert model.chat_inner(utterances) == model.engine.ask(turns, files[:1], max_new_tokens=8).text


def test_multiple_choice_questions_are_asked_as_the_reference_asks_them(model, files):
    model.set_dump_image(lambda line: files)
    assert model.use_custom_prompt("MMBench_DEV_EN") and not model.use_custom_prompt("POPE")
    line = {"hint": float("nan"), "question": "Which?", "A": "red", "B": 2, "C": float("nan"), "answer": "A"}
    *images, asked = model.build_prompt(line, "MMBench_DEV_EN")
    assert images == [image(path) for path in files]
    suffix = "Answer with the option's letter from the given choices directly."
    assert asked == text(f"Which?\nA. red\nB. 2\n{suffix}")
    asked = model.build_prompt({"hint": "Look.", "question": "哪一个?", "A": "红"}, "MMBench_DEV_CN")[-1]
    assert asked == text("Look.\n哪一个?\nA. 红\n请直接回答选项字母。")
    assert model.build_prompt({"question": "Why?"}, "MMBench_DEV_EN")[-1] == text("Why?\nAnswer the question directly.")


def test_what_cannot_be_asked(model, tmp_path):
    with pytest.raises(InputError, match=r"lost.png"):
        model.generate([image(str(tmp_path / "lost.png")), text(QUESTION)])
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate([{"type": "video", "value": "a.mp4"}])
