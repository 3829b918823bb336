"""ScienceQA's problems as training data."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from helpers import turns
from train.datasets import scienceqa
from train.samples import Samples

PROBLEM = {
    "question": "Which is  a cat?", "choices": ["a dog", "a cat"], "answer": 1, "hint": "Look at the picture.",
    "image": "image.png", "lecture": "Cats meow.\nDogs bark.", "solution": "It meows.",
}  # fmt: skip
ASKED = "Which is a cat?\nContext: Look at the picture.\nOptions: (A) a dog (B) a cat"


@pytest.mark.parametrize(
    ("prompt_format", "changes", "question", "answer"),
    [
        ("QCM-LEA", {}, ASKED, "Cats meow.\nDogs bark. It meows. The answer is B."),
        ("QCM-LEA", {"lecture": "", "hint": " "}, ASKED.replace("Look at the picture.", "N/A"),
         "It meows. The answer is B."),
        ("QCM-LEA", {"lecture": "", "solution": ""}, ASKED, " The answer is B."),
        ("QCM-A", {}, ASKED, "The answer is B."),
        ("QCM-AL", {}, ASKED, "The answer is B. BECAUSE: It meows."),
        ("QCM-AE", {"lecture": ""}, ASKED, "The answer is B."),
        ("QCM-ALE", {}, ASKED, "The answer is B. BECAUSE: Cats meow.\nDogs bark. It meows."),
        ("QCM-AEL", {}, ASKED, "The answer is B. BECAUSE: It meows. Cats meow.\nDogs bark."),
        ("QCM-LA", {}, ASKED, "Cats meow.\nDogs bark. The answer is B."),
        ("QCM-EA", {}, ASKED, "It meows. The answer is B."),
        ("QCM-ELA", {}, ASKED, "It meows. Cats meow.\nDogs bark. The answer is B."),
        ("QCM-LEPA", {}, ASKED, "LECTURE: Cats meow.\nDogs bark.\nSOLUTION: It meows.\n###\nANSWER: B."),
        ("QCM-LEPA", {"lecture": " ", "solution": ""}, ASKED, "###\nANSWER: B."),
        ("CQM-A", {}, "Context: Look at the picture.\nQuestion: Which is a cat?\nOptions: (A) a dog (B) a cat",
         "The answer is B."),
        ("QCML-A", {"lecture": ""}, ASKED, "The answer is B."),
        ("QCMLE-A", {}, f"{ASKED}\nBECAUSE: Cats meow.\nDogs bark. It meows.", "The answer is B."),
        ("QCEM-A", {}, ASKED.replace("\nOptions", "\nBECAUSE: It meows.\nOptions"), "The answer is B."),
    ],
)  # fmt: skip
def test_scienceqa_prompts(prompt_format, changes, question, answer):
    """To the space, as scripts/convert_sqa_to_llava.py of the reference writes them."""
    assert scienceqa.question_and_answer(PROBLEM | changes, prompt_format) == (question, answer)


def test_scienceqa_file(tmp_path, run_cli, models, folder):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM, "8": PROBLEM | {"image": None}, "9": {}}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["8", "7"], "test": ["9"]}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    path = tmp_path / "llava_train_QCM-LEA.json"
    assert (status, err) == (0, f"2 conversations, 1 of them with an image, in {path}\n")
    answer = "Cats meow.\nDogs bark. It meows. The answer is B."
    assert json.loads(path.read_text()) == [
        {"id": "8", "conversations": turns(ASKED, answer)},
        {"id": "7", "image": "7/image.png", "conversations": turns(f"{ASKED}\n<image>", answer)},
    ]
    (tmp_path / "7").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "7" / "image.png")
    samples = Samples(str(path), str(tmp_path), *models["v1.5-llama"])
    assert samples.measure(1).tiles == samples.load(samples.measure(1)).tile_count == 1
    mine = [{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>"}]}]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    for args, says in [
        (["--split", "train", "--prompt-format", "QCM-X"], "--prompt-format 'QCM-X'"),
        (["--split", "dev"], "--split dev: .*pid_splits.json has train, test"),
        (["--split", "test"], "problem 9 is not ScienceQA's"),
        ([], "the following arguments are required: --split"),
        (["--splits", "train"], "the following arguments are required: --split"),
        (["--split", "train", "train"], "unrecognized arguments: train"),
        (["--split", "train", "--output", str(folder)], "does not hold ScienceQA conversations"),
        (["--split", "train", "--output", str(tmp_path / "mine.json")], "does not hold ScienceQA conversations"),
        (["--split", "train", "--output", str(tmp_path / "problems.json")], "does not hold ScienceQA conversations"),
        (["--split", "train", "--output", str(folder / "0.png" / "a.json")], "cannot be written"),
        (["--split", "train", "--base-dir", str(folder)], "problems.json: no such file"),
    ]:
        status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, *args)
        assert status == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert re.search(says, err)


@pytest.mark.parametrize("answer", [-1, 2, 7, None, "1", 0.5])
def test_scienceqa_answer_that_is_no_choice(answer, tmp_path, run_cli):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM | {"answer": answer}}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    says = f"{tmp_path}/problems.json: problem 7: answer {answer!r} is not one of its 2 choices (counted from 0)"
    assert (status, err) == (1, f"error: {says}\n")
    assert not (tmp_path / "llava_train_QCM-LEA.json").exists()


@pytest.mark.parametrize("split", ["7", 7, None, {"7": 1}, [7], ["7", ["7"]]])
def test_scienceqa_split_that_is_no_list(split, tmp_path, run_cli):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": split}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    says = f"error: {tmp_path}/pid_splits.json: train must be a list of problem numbers, as strings\n"
    assert (status, err) == (1, says)


def test_scienceqa_file_is_whole_or_as_it_was(tmp_path, run_cli, monkeypatch):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    path = tmp_path / "llava_train_QCM-LEA.json"
    path.write_text("[]")
    opened = Path.open

    def full_disk(self, mode="r", *more, **settings):
        file = opened(self, mode, *more, **settings)
        if "r" not in mode:
            file.write(b"[{")
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full_disk)
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    assert (status, err) == (1, f"error: {path}: cannot be written (No space left on device)\n")
    assert path.read_text() == "[]"
    assert {file.name for file in tmp_path.iterdir()} == {"problems.json", "pid_splits.json", path.name}
