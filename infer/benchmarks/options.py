"""Read the option out of an answer to a multiple-choice question: the reference's rule, and those of lmms-eval."""

import re
from collections.abc import Iterable, Mapping

LETTERS = "ABCDE"
CHOOSE = "\nAnswer with the option's letter from the given choices directly."  # the reference ends questions with it
API_FAILURE = "Failed to obtain answer via API"  # in the place of an answer, in lmms-eval's files

# What may stand before and after a letter for it to be a word of an answer (lmms-eval).
_MARKS = [("", after) for after in (".", ",", ":", ")", ").")]
_MARKS += [("(", after) for after in (")", ").")]
_MARKS += [(":", after) for after in ("", ",", ".", ")", ").")]

# Phrases before the letter (lmms-eval), in English, Korean, Chinese and Japanese.
_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def read_option(answer: str) -> str | None:
    """Parse the option of an answer: the letter that it is or begins with ("B. ..."), or the only one after "The answer
    is"; None if there is none (llava/eval/eval_science_qa.py).

    A letter without an option is returned too, and counts as wrong. (The reference once drew an option at random then.)
    """
    if re.fullmatch("[A-E]", answer) or re.match(r"[A-E]\. ", answer):
        return answer[0]
    found = re.findall("The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The option that an answer names by its letter, or else by its text; None if that is not a single one
    (`MMBench_Evaluator.can_infer` of lmms_eval/tasks/mmbench/mmbench_evals.py).

    Args:
      choices: letter -> text of the options.
    """
    return infer_letter(answer) or infer_text(answer, choices)


def infer_letter(answer: str) -> str | None:
    """The only letter from A to E that is a word of an answer, or one in the same marks ("B.", "(B)"). Options that the
    question does not have are named too. "A" in more than three words is an article (`can_infer_option`)."""
    if API_FAILURE in answer:
        return None
    words = answer.split()
    named = [letter for letter in LETTERS if letter in words]
    if len(named) == 1 and not (named == ["A"] and len(words) > 3):
        return named[0]
    for before, after in _MARKS:
        marked = [letter for letter in LETTERS if before + letter + after in words]
        if len(marked) == 1:
            return marked[0]
    return None


def infer_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """The only option whose text is part of an answer, ignoring case (`can_infer_text`)."""
    answer = answer.lower()
    found = [letter for letter, text in choices.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


def find_letter(answer: str, letters: Iterable[str]) -> str | None:
    """The letter that an answer most likely means: the one in the clearest form, and of those the last
    (`extract_mcq_answer` of lmms_eval/tasks/_task_utils/mcq_extract.py)."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    inner, text = text.strip(), f" {text} "
    letters = sorted(letters)
    found: list[tuple[int, int, str]] = []  # how clear the form is, where the letter stands
    for clarity, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [(clarity, at, letter) for letter in letters if (at := text.rfind(form.format(letter))) >= 0]
    lower = text.lower()
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0:
            after = start + len(phrase)
            found += [(7, at, letter) for letter in letters if (at := text.find(letter, after)) >= 0]
    for letter in letters:
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((10, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    if not found:
        found = [(0, at, letter) for letter in letters if (at := text.rfind(letter)) >= 0]
    return max(found, key=lambda one: one[:2])[2] if found else None
