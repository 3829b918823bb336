"""MME: two yes-or-no questions about each image, in 14 categories (arXiv:2306.13394).

Answers are read as lmms-eval reads them (tasks/mme/utils.py). MME's own calculation.py, which the reference calls,
differs in rare ones only: it reads neither "y" nor "n" alone, and counts spaces and full stops among the first four
characters. So there is one protocol.
"""

import collections
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from infer.benchmarks.benchmark import Answer, Benchmark, File, Mark, Question, Score
from infer.benchmarks.files import EVAL_ZIP, MAX_BYTES, SHORT_ANSWER, find, match, published_numbers, read_questions
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.files import read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."  # MME's own suffix, which the reference replaces by `SHORT_ANSWER`

DATA = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
QUESTIONS = File("llava_mme.jsonl", EVAL_ZIP, "0.6 MB")
RELEASE = File("MME_Benchmark_release_version", DATA, "2,374 questions, 1,187 images", "images")
TEMPLATES = File("eval_tool/Your_Results", DATA, f"0.2 MB, to score without {RELEASE.path}", "")

Key = tuple[str, str, str]  # category, image without suffix, question without "Please answer ..."


class MME(Benchmark):
    """MME. Questions have the ids of their images, "CATEGORY/[images/]NAME.jpg" (convert_answer_to_mme.py)."""

    name, title, directory = "mme", "MME", "MME"
    files = (QUESTIONS, RELEASE, TEMPLATES)
    published = published_numbers(1510.7, 1531.3, 1476.9, 1541.7, 1519, 1498, 1575, 1631)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return read_questions(find(directory, QUESTIONS), directory / RELEASE.path, ids_repeat=True)

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        right = read_right_answers(directory)
        has_questions = (directory / QUESTIONS.path).exists()
        asked = {_key(str(q.id), q.prompt): q for q in self.questions(directory, protocol)} if has_questions else {}
        found = match(answers, right.keys() | asked.keys(), lambda answer: _key(str(answer.id), answer.prompt))
        if unknown := len(asked.keys() - right.keys()):  # MME's templates omit two images
            note(f"warning: no right answer here to {plural(unknown, 'question')} of {QUESTIONS.path}; not scored")
        marks = []
        for key, label in right.items():
            category, image, bare = key
            answer = found.get(key)
            one = answer or asked.get(key) or Answer(f"{category}/{image}", bare + SHORT_ANSWER, "")
            text, said = (answer.text, read_answer(answer.text)) if answer else ("", "")
            marks.append(
                Mark(one.id, one.prompt, text, float(said == label), said, label, category, f"{category}/{image}")
            )
        return self._score(marks, protocol, len(right.keys() - found.keys()))

    def _score(self, marks: Sequence[Mark], protocol: str, unanswered: int) -> Score:
        images: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for mark in marks:
            images[mark.kind][mark.group].append(mark.score)
        points = {kind: [_points(pair) for pair in groups.values()] for kind, groups in images.items()}
        means = {kind: statistics.fmean(some) for kind, some in points.items()}
        missing = [kind for kind in PERCEPTION + COGNITION if kind not in means]
        if missing:
            note(f"warning: MME has no questions of {', '.join(missing)} here; its scores are sums of the others")
        totals = {
            "perception": sum(means.get(kind, 0.0) for kind in PERCEPTION),
            "cognition": sum(means.get(kind, 0.0) for kind in COGNITION),
        }
        variances = [
            statistics.variance(points[kind]) / len(points[kind])
            for kind in PERCEPTION
            if len(points.get(kind, ())) > 1
        ]
        return Score(
            "perception", totals["perception"], 1, protocol,
            totals=totals,
            parts={kind: {"score": mean, "questions": 2 * len(points[kind])} for kind, mean in means.items()},
            marks=marks,
            unanswered=unanswered,
            stderr=math.sqrt(sum(variances)),
        )  # fmt: skip


def _points(pair: Sequence[float]) -> float:
    """The points of an image: 100 times its accuracy, and 100 more if both answers are right."""
    return 50 * sum(pair) + 100 * (sum(pair) == 2)


def read_answer(text: str) -> str:
    """Read "yes" or "no" out of an answer's first four characters; "" if there is neither."""
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "")
    return next((word for word in ("yes", "no") if word in said[:4]), "")


# ---------------------------------------------------------------- right answers


def read_right_answers(directory: Path) -> dict[Key, str]:
    """Read which answers are right, from the text files beside the images, or else from MME's evaluation tool.

    Raises:
      InputError: a file is missing or invalid, or an image does not have two questions.
    """
    right: dict[Key, str] = {}
    for category in PERCEPTION + COGNITION:
        folder = directory / RELEASE.path / category
        apart = folder / "questions_answers_YN"
        texts = sorted((apart if apart.is_dir() else folder).glob("*.txt"))
        template = directory / TEMPLATES.path / f"{category}.txt"
        if texts:
            for path in texts:
                _read_rows(path, category, right, path.stem)
        elif template.exists():
            _read_rows(template, category, right)
    if not right:
        find(directory, RELEASE)
        raise InputError(f"{shorten(directory / RELEASE.path)}: has no CATEGORY/*.txt with questions; it is in {DATA}")
    for (category, image), n in collections.Counter((category, image) for category, image, _ in right).items():
        if n != 2:
            raise InputError(f"{shorten(directory)}: {category}/{image} has {plural(n, 'question')} instead of 2")
    return right


def _read_rows(path: Path, category: str, right: dict[Key, str], image: str = "") -> None:
    """Read lines of question and answer, separated by tabs; those of a template begin with their image.

    Raises:
      InputError: the file cannot be read, a line is invalid, or a question is there twice. Names the line.
    """
    for number, line in enumerate(read_text(path, MAX_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shorten(path)} line {number}"
        columns = [column.strip() for column in line.strip().split("\t")]
        if len(columns) != (2 if image else 3):
            raise InputError(f"{where}: expected {'' if image else 'image, '}question and answer, separated by tabs")
        name = image or columns[0].partition(".")[0]
        label = columns[-1].lower()
        if label not in ("yes", "no"):
            raise InputError(f"{where}: the answer {shorten(columns[-1])!r} must be Yes or No")
        key = category, name.partition(".")[0], _bare(columns[-2])
        if key in right:
            raise InputError(f"{where}: the question is there twice")
        right[key] = label


def _key(id: str, prompt: str) -> Key:
    return id.partition("/")[0], id.rpartition("/")[2].partition(".")[0], _bare(prompt)


def _bare(text: str) -> str:
    """A question without the suffixes of MME and of the reference."""
    return text.replace(SHORT_ANSWER.strip(), "").replace(YES_OR_NO, "").strip()
