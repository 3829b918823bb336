"""ScienceQA's test split, asked and scored as the reference does (llava/eval/model_vqa_science.py, eval_science_qa.py).

scienceqa        all 4,241 questions
scienceqa-img    the 2,017 with an image: "SQA" in the tables of LLaVA-1.5 and later
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from infer.benchmarks.benchmark import Answer, Benchmark, File, Mark, Question, Score
from infer.benchmarks.options import read_option
from infer.benchmarks.shared import (
    CHOOSE,
    accuracy,
    accuracy_score,
    check_unique,
    find_image,
    image_folder,
    match_answers,
    read_document,
)
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.data import scienceqa as wording
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.json_files import check_json

PROBLEMS, SPLITS, PROMPTS = "problems.json", "pid_splits.json", "llava_test_CQM-A.json"
SPLIT = "test"
OPTIONS = wording.OPTIONS
REPOSITORY = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"


class Problem(TypedDict):
    """What scoring needs of an entry of `problems.json`."""

    choices: Annotated[list[str], Meta(min_length=1, max_length=len(OPTIONS))]
    answer: int  # an index of `choices`
    image: NotRequired[str | None]
    hint: NotRequired[str]
    subject: NotRequired[str]
    grade: NotRequired[str]


class Turn(TypedDict):
    value: str


class Prompt(TypedDict):
    """A row of `llava_test_CQM-A.json`."""

    id: str
    image: NotRequired[str]
    conversations: Annotated[list[Turn], Meta(min_length=1)]


# The columns of ScienceQA's tables (tools/evaluate_acc.py of its repository).
PARTS: dict[str, Callable[[Any], bool]] = {
    "NAT": lambda problem: problem.get("subject") == "natural science",
    "SOC": lambda problem: problem.get("subject") == "social science",
    "LAN": lambda problem: problem.get("subject") == "language science",
    "TXT": lambda problem: bool(problem.get("hint")),
    "IMG": lambda problem: bool(problem.get("image")),
    "NO": lambda problem: not problem.get("hint") and not problem.get("image"),
    "G1-6": lambda problem: problem.get("grade") in {f"grade{n}" for n in range(1, 7)},
    "G7-12": lambda problem: problem.get("grade") in {f"grade{n}" for n in range(7, 13)},
}


class ScienceQA(Benchmark):
    name = "scienceqa"
    title = "ScienceQA"
    files = (
        File(PROBLEMS, REPOSITORY, "about 30 MB"),
        File(SPLITS, REPOSITORY, "0.5 MB"),
        File(PROMPTS, "eval.zip of the reference's docs/Evaluation.md; without it the same is built", "about 5 MB", ""),
        File("images/test", "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip", "about 120 MB", "images"),
    )
    max_new_tokens = 1024

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        problems = read_problems(directory)
        images = image_folder(directory / "images" / SPLIT)
        questions = []
        for row in self._prompts(directory, problems):
            if row["id"] not in problems:
                raise InputError(
                    f"{shorten(directory / PROMPTS)}: question {shorten(row['id'])} is not in the split {SPLIT} of "
                    f"{SPLITS}"
                )
            problem = problems[row["id"]]
            prompt = row["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip() + f"\n{CHOOSE}"
            name, found, error = f"question {shorten(row['id'])}", (), ""
            if "image" in row:
                prompt = f"{IMAGE_TOKEN}\n{prompt}"
                found, error = find_image(images, row["image"], name)
            answer = f"{OPTIONS[problem['answer']]}. {problem['choices'][problem['answer']]}"
            kind = problem.get("subject", "all")
            questions.append(Question(row["id"], (prompt,), prompt, found, kind, answer, name=name, problem=error))
        return questions

    def _prompts(self, directory: Path, problems: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of the reference's question file, or the same built from the problems."""
        path = directory / PROMPTS
        if path.exists():
            rows = read_document(path, list[Prompt])
            check_unique((row["id"] for row in rows), path)
            return rows
        return [_prompt(directory, number, problem) for number, problem in problems.items()]

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        problems = read_problems(directory)
        given = match_answers(answers, problems, self.title)
        marks = [_mark(number, problem, given.get(number)) for number, problem in problems.items()]
        parts = {}
        for name, has in PARTS.items():
            if some := [mark for mark, problem in zip(marks, problems.values(), strict=True) if has(problem)]:
                parts[name] = accuracy(some)
        more = {}
        if with_image := [mark for mark in marks if IMAGE_TOKEN in mark.prompt]:  # as the reference decides it
            more["IMG accuracy"] = accuracy(with_image)["accuracy"]
        return accuracy_score(marks, protocol, len(problems) - len(given), parts=parts, more=more)


class ScienceQAImages(ScienceQA):
    """The questions that have an image."""

    name = "scienceqa-img"
    title = "ScienceQA-IMG"
    directory = "scienceqa"
    published: Mapping[str, float] = {
        "v1.5-7B": 66.8, "v1.5-13B": 71.6, "v1.5-7B LoRA": 68.4, "v1.5-13B LoRA": 71.2, "v1.6-vicuna-7B": 70.1,
        "v1.6-mistral-7B": 72.8, "v1.6-vicuna-13B": 73.6, "v1.6-34B": 81.8,
    }  # fmt: skip

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return [question for question in super().questions(directory, protocol) if IMAGE_TOKEN in question.prompt]

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        problems = read_problems(directory)
        given = match_answers(answers, problems, self.title)
        asked = {number: problem for number, problem in problems.items() if problem.get("image")}
        if others := len(given.keys() - asked.keys()):
            note(f"{plural(others, 'answer')} not scored: to questions without an image")
        marks = [_mark(number, problem, given.get(number)) for number, problem in asked.items()]
        return accuracy_score(marks, protocol, len(asked.keys() - given.keys()))


def _prompt(directory: Path, number: str, problem: dict[str, Any]) -> dict[str, Any]:
    where = f"{shorten(directory / PROBLEMS)}: problem {shorten(number)}"
    check_json(problem, wording.Problem, where)
    text, _ = wording.question_and_answer(problem, "CQM-A")
    image = {} if problem["image"] is None else {"image": f"{number}/{problem['image']}"}
    return {"id": number, "conversations": [{"value": text}]} | image


def _mark(number: str, problem: Any, answer: Answer | None) -> Mark:
    """Without an answer the prompt is empty too, so that the question counts as one without an image, as it does in the
    reference."""
    text = answer.text if answer else ""
    read = read_option(text) or ""
    right = OPTIONS[problem["answer"]]
    return Mark(
        question=number,
        prompt=answer.prompt if answer else "",
        text=text,
        score=float(read == right),  # a letter beyond the choices never is
        read=read,
        answer=f"{right}. {problem['choices'][problem['answer']]}",
        kind=problem.get("subject", "all"),
        group=number,
    )


def read_problems(directory: Path) -> dict[str, Any]:
    """The problems of the test split, in its order, by their number.

    Raises:
      InputError: a file is missing or not ScienceQA's.
    """
    path, splits_path = directory / PROBLEMS, directory / SPLITS
    problems, splits = read_document(path, dict[str, Any]), read_document(splits_path, dict[str, Any])
    if SPLIT not in splits:
        raise InputError(f"{shorten(splits_path)}: has no split {SPLIT}, only {shorten(', '.join(splits))}")
    numbers = check_json(splits[SPLIT], list[str], f"{shorten(splits_path)}: {SPLIT}")
    if not numbers:
        raise InputError(f"{shorten(splits_path)}: {SPLIT}: is empty")
    check_unique(numbers, splits_path)
    checked = {}
    for number in numbers:
        where = f"{shorten(path)}: problem {shorten(number)}"
        if number not in problems:
            raise InputError(f"{where} is missing, which {SPLITS} has in {SPLIT}")
        problem = check_json(problems[number], Problem, where)
        if not 0 <= problem["answer"] < len(problem["choices"]):
            n = plural(len(problem["choices"]), "choice")
            raise InputError(f"{where}: answer {problem['answer']} is not one of its {n} (counted from 0)")
        checked[number] = problems[number] | problem
    return checked
