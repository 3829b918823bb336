"""ScienceQA's test split, asked and scored as the reference does (llava/eval/model_vqa_science.py, eval_science_qa.py).

scienceqa        all 4,241 questions
scienceqa-img    the 2,017 with an image: "SQA" in the tables of LLaVA-1.5 and later
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from infer.benchmarks.benchmark import Answer, Benchmark, File, Mark, Question, Score
from infer.benchmarks.files import (
    EVAL_ZIP,
    accuracy,
    accuracy_score,
    find,
    image_path,
    match,
    published_numbers,
    read_object,
)
from infer.benchmarks.options import CHOOSE, read_option
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.data import scienceqa as wording
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.json_files import check_json

REPOSITORY = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
PROBLEMS = File("problems.json", REPOSITORY, "30 MB")
SPLITS = File("pid_splits.json", REPOSITORY, "0.5 MB")
PROMPTS = File("llava_test_CQM-A.json", EVAL_ZIP, "3 MB; built from problems.json if it is missing", "")
IMAGES = File(
    "images/test", "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip", "2,017 images, 0.1 GB", "images"
)
SPLIT = "test"
OPTIONS = wording.OPTIONS


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
    files = (PROBLEMS, SPLITS, PROMPTS, IMAGES)
    max_new_tokens = 1024

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        problems = read_problems(directory)
        path = directory / PROMPTS.path
        has_prompts = path.exists()
        rows = read_prompts(path) if has_prompts else [_prompt(directory, *one) for one in problems.items()]
        questions = []
        for row in rows:
            name = f"{shorten(path if has_prompts else directory / PROBLEMS.path)}: question {shorten(row['id'])}"
            if row["id"] not in problems:
                raise InputError(f"{name} is not in the split {SPLIT} of {SPLITS.path}")
            problem = problems[row["id"]]
            prompt = row["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip() + CHOOSE
            images: tuple[str, ...] = ()
            if "image" in row:
                prompt = f"{IMAGE_TOKEN}\n{prompt}"
                images = (image_path(directory / IMAGES.path, row["image"], name),)
            kind, answer = problem.get("subject", "all"), _in_words(problem)
            questions.append(Question(row["id"], (prompt,), prompt, images, kind, answer, name=name))
        return questions

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        problems = read_problems(directory)
        given = match(answers, problems)
        marks = [_mark(number, problem, given.get(number)) for number, problem in problems.items()]
        pairs = list(zip(marks, problems.values(), strict=True))
        parts = {name: [mark for mark, problem in pairs if has(problem)] for name, has in PARTS.items()}
        parts = {name: some for name, some in parts.items() if some}
        totals = {}
        if with_image := [mark for mark in marks if IMAGE_TOKEN in mark.prompt]:  # as the reference decides it
            totals["IMG accuracy"] = accuracy(with_image)
        unanswered = len(problems) - len(given)
        return accuracy_score(marks, protocol, unanswered=unanswered, parts=parts, totals=totals)


class ScienceQAImages(ScienceQA):
    """The questions that have an image."""

    name = "scienceqa-img"
    title = "ScienceQA-IMG"
    directory = "scienceqa"
    published = published_numbers(66.8, 71.6, 68.4, 71.2, 70.1, 72.8, 73.6, 81.8)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return [question for question in super().questions(directory, protocol) if IMAGE_TOKEN in question.prompt]

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        problems = read_problems(directory)
        given = match(answers, problems)
        asked = {number: problem for number, problem in problems.items() if problem.get("image")}
        if not asked:
            raise InputError(f"{shorten(directory / PROBLEMS.path)}: no problem of the split {SPLIT} has an image")
        if others := len(given.keys() - asked.keys()):
            note(f"{plural(others, 'answer')} not scored: to questions without an image")
        marks = [_mark(number, problem, given.get(number)) for number, problem in asked.items()]
        return accuracy_score(marks, protocol, unanswered=len(asked.keys() - given.keys()))


def read_prompts(path: Path) -> list[Any]:
    """The rows of the reference's question file.

    Raises:
      InputError: the file is not such a file, or has a question twice.
    """
    rows, seen = read_object(path, list[Prompt]), set()
    for row in rows:
        if row["id"] in seen:
            raise InputError(f"{shorten(path)}: question {shorten(row['id'])} is there twice")
        seen.add(row["id"])
    return rows


def _prompt(directory: Path, number: str, problem: dict[str, Any]) -> dict[str, Any]:
    """A row as the reference's question file has it."""
    check_json(problem, wording.Problem, f"{shorten(directory / PROBLEMS.path)}: problem {shorten(number)}")
    text, _ = wording.question_and_answer(problem, "CQM-A")
    image = {} if problem["image"] is None else {"image": f"{number}/{problem['image']}"}
    return {"id": number, "conversations": [{"value": text}]} | image


def _in_words(problem: Any) -> str:
    return f"{OPTIONS[problem['answer']]}. {problem['choices'][problem['answer']]}"


def _mark(number: str, problem: Any, answer: Answer | None) -> Mark:
    """Without an answer the prompt is empty too, so that the question counts as one without an image, as it does in the
    reference."""
    prompt, text = (answer.prompt, answer.text) if answer else ("", "")
    read = read_option(text) or ""
    score = float(read == OPTIONS[problem["answer"]])  # a letter beyond the choices never is
    return Mark(number, prompt, text, score, read, _in_words(problem), problem.get("subject", "all"))


def read_problems(directory: Path) -> dict[str, Any]:
    """The problems of the test split, in its order, by their number.

    Raises:
      InputError: a file is missing or not ScienceQA's.
    """
    path, splits_path = find(directory, PROBLEMS), find(directory, SPLITS)
    problems, splits = read_object(path, dict[str, Any]), read_object(splits_path, dict[str, Any])
    if SPLIT not in splits:
        raise InputError(f"{shorten(splits_path)}: has no split {SPLIT}, only {shorten(', '.join(splits))}")
    numbers = check_json(splits[SPLIT], list[str], f"{shorten(splits_path)}: {SPLIT}")
    if not numbers:
        raise InputError(f"{shorten(splits_path)}: {SPLIT} is empty")
    checked: dict[str, Any] = {}
    for number in numbers:
        where = f"{shorten(path)}: problem {shorten(number)}"
        if number in checked:
            raise InputError(f"{shorten(splits_path)}: problem {shorten(number)} is in {SPLIT} twice")
        if number not in problems:
            raise InputError(f"{where} is missing, which {SPLITS.path} has in {SPLIT}")
        problem = check_json(problems[number], Problem, where)
        if not 0 <= problem["answer"] < len(problem["choices"]):
            n = plural(len(problem["choices"]), "choice")
            raise InputError(f"{where}: answer {problem['answer']} is not one of its {n} (counted from 0)")
        checked[number] = problems[number] | problem
    return checked
