"""ScienceQA's problems in words, exactly as the reference writes them (scripts/convert_sqa_to_llava_base_prompt.py)."""

import re
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from llava_jax.console import InputError, shorten

# Letters of a prompt format: Question, Context, Multiple choices; Lecture, Explanation (the solution), Answer.
QUESTIONS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
ANSWERS = {
    "A": "Answer: The answer is {A}.",
    "AL": "Answer: The answer is {A}. BECAUSE: {E}",  # the reference swaps this one and the next
    "AE": "Answer: The answer is {A}. BECAUSE: {L}",
    "ALE": "Answer: The answer is {A}. BECAUSE: {L} {E}",
    "AEL": "Answer: The answer is {A}. BECAUSE: {E} {L}",
    "LA": "Answer: {L} The answer is {A}.",
    "EA": "Answer: {E} The answer is {A}.",
    "LEA": "Answer: {L} {E} The answer is {A}.",
    "ELA": "Answer: {E} {L} The answer is {A}.",
    "LEPA": "",  # see `_answer`
}
OPTIONS = "ABCDE"


class Problem(TypedDict):
    """An entry of `problems.json`."""

    question: str
    hint: str
    choices: Annotated[list[str], Meta(max_length=len(OPTIONS))]
    lecture: str
    solution: str
    answer: Any  # an index of `choices`
    image: str | None


def question_and_answer(problem: dict[str, Any], prompt_format: str) -> tuple[str, str]:
    """The two turns of a problem, with exactly the reference's text.

    Raises:
      InputError: the prompt format is unknown.
    """
    asked, _, answered = prompt_format.partition("-")
    if asked not in QUESTIONS or answered not in ANSWERS:
        raise InputError(
            f"--prompt-format {shorten(prompt_format)!r}: must be one of {', '.join(QUESTIONS)}, then -, then one "
            f"of {', '.join(ANSWERS)}"
        )
    parts = {
        "Q": problem["question"],
        "C": problem["hint"].strip() or "N/A",
        "M": " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False)),
        "L": problem["lecture"],
        "E": problem["solution"],
        "A": OPTIONS[problem["answer"]],
    }
    headings = {"Q": "Question", "C": "Context", "M": "Options"}
    lines = [
        f"{headings.get(letters, 'BECAUSE')}: {' '.join(parts[letter] for letter in letters)}"
        for letters in re.findall("Q|C|M|[LE]+", asked)
    ]
    return _tidy("\n".join(lines) + "\n", "Question: "), _tidy(_answer(parts, answered), "Answer: ")


def _answer(parts: dict[str, str], letters: str) -> str:
    if letters != "LEPA":
        return ANSWERS[letters].format(**parts)
    lecture = f"LECTURE: {parts['L']}\n" if parts["L"].strip() else ""
    solution = f"SOLUTION: {parts['E']}\n" if parts["E"].strip() else ""
    return f"{lecture}{solution}###\nANSWER: {parts['A']}."


def _tidy(text: str, heading: str) -> str:
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(heading, "") if text.startswith(heading) else text
