"""Short answers, compared with the answers of ten people, as the evaluators of the VQA challenges do.

A right answer is one that at least three people gave. So that people can be scored too, each of the ten is left out
once, and an answer's accuracy is the mean over i of min(1, matches among the other nine / 3).
"""

import functools
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec

TenAnswers = Annotated[list[str], msgspec.Meta(min_length=10, max_length=10)]

# The tables are those of GT-Vision-Lab/VQA: PythonEvaluationTools/vqaEvaluation/vqaEval.py.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "Id've": "I'd've", "I'dve": "I'd've", "Im": "I'm", "Ive": "I've", "isnt": "isn't", "itd": "it'd",
    "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll", "let's": "let's", "maam": "ma'am",
    "mightnt": "mightn't", "mightnt've": "mightn't've", "mightn'tve": "mightn't've", "mightve": "might've",
    "mustnt": "mustn't", "mustve": "must've", "neednt": "needn't", "notve": "not've", "oclock": "o'clock",
    "oughtnt": "oughtn't", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't",
    "shed've": "she'd've", "she'dve": "she'd've", "she's": "she's", "shouldve": "should've", "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebodyll": "somebody'll",
    "somebodys": "somebody's", "someoned": "someone'd", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "someonell": "someone'll", "someones": "someone's", "somethingd": "something'd",
    "somethingd've": "something'd've", "something'dve": "something'd've", "somethingll": "something'll",
    "thats": "that's", "thered": "there'd", "thered've": "there'd've", "there'dve": "there'd've",
    "therere": "there're", "theres": "there's", "theyd": "they'd", "theyd've": "they'd've", "they'dve": "they'd've",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "twas": "'twas", "wasnt": "wasn't",
    "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't", "whatll": "what'll",
    "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's", "whered": "where'd",
    "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've", "who'dve": "who'd've",
    "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll", "whyre": "why're", "whys": "why's",
    "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd": "you'd",
    "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip


def normalize(text: str) -> str:
    """An answer as EvalAI compares it (llava/eval/m4c_evaluator.py: EvalAIAnswerProcessor)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _normalize_words(_one_line(text))


def textvqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """The accuracy of an answer by TextVQA's rule (llava/eval/m4c_evaluator.py: TextVQAAccuracyEvaluator)."""
    return leave_one_out(normalize(text), list(map(normalize, answers)))


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """The accuracy that the evaluator of VQAv2 (vqaEval.py: evaluate) gives to what the reference submits, which is
    normalized already. The evaluator normalizes too, but nothing if all ten people said the same."""
    said, answers = normalize(text), list(map(_one_line, answers))
    if len(set(answers)) > 1:
        said, answers = _normalize_words(said), list(map(_normalize_words, answers))
    return leave_one_out(said, answers)


def vizwiz_accuracy(text: str, answers: Sequence[str]) -> float:
    """The accuracy that VizWiz's evaluator (vqaEval.py of its API: evaluate) gives to what the reference submits. It
    never normalizes people's answers."""
    return leave_one_out(_normalize_words(normalize(text)), answers)


def leave_one_out(said: str, answers: Sequence[str]) -> float:
    """The mean over people of the answer's accuracy among the others. All texts are compared as they are."""
    matches, people = answers.count(said), len(answers)
    of_those_who_agree, of_others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * of_those_who_agree + (people - matches) * of_others) / people


def most_common(answers: Sequence[str]) -> str:
    """The answer that most people gave; of several, the first."""
    return max(answers, key=answers.count)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(2**16)  # people's answers repeat
def _normalize_words(text: str) -> str:
    """Replaces punctuation, digits, articles and contractions (vqaEval.py: processPunctuation, processDigitArticle)."""
    has_comma_in_number = re.search(r"\d,\d", text)
    words = text
    for mark in filter(text.__contains__, _PUNCTUATION):
        beside_space = f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if beside_space or has_comma_in_number else " ")
    # The evaluators pass re.UNICODE, which is 32, where `re.sub` expects the number of replacements.
    words = re.sub(r"\.(?!\d)", "", words, count=32)
    found = (_NUMBERS.get(word, word) for word in words.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in found if word not in _ARTICLES)
