"""Answers of language models as questions and answers: parsed from whatever form the model chose, and checked.

Parsing is tolerant: of Markdown, numbering, text around the answer, and JSON. Checking is strict, since what passes is
trained on. The reason for which an answer is rejected is addressed to the model, which is asked again with it.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llava_jax.console import InputError, shorten
from llava_jax.json_files import parse_json
from train.datasets.instruct.messages import Prompt

Turn = tuple[str, str]  # question, answer


class BadAnswer(Exception):
    """The answer cannot be used; the message says why, to the model."""


class Limits(NamedTuple):
    """How many questions an answer has, and the length of each reply in characters."""

    questions: tuple[int, int]
    characters: tuple[int, int]


LIMITS = {
    "conversation": Limits((2, 20), (1, 1500)),
    "detail": Limits((1, 1), (100, 5000)),
    "reasoning": Limits((1, 4), (80, 5000)),
}
MAX_QUESTION, MAX_CHARACTERS = 500, 50_000  # of a question, of a reply
LEAKED_WORDS = 10  # of the prompt in a row
FOREIGN = 0.1  # largest share of letters that are not Latin
ENGLISH, MIN_WORDS = 0.15, 20  # smallest share of words that are frequent in English, in texts of so many words
FREQUENT = frozenset(
    "a an and are as at be by can for from has have he in is it its not of on or she that the their there they this to "
    "two up was what which who with you".split()
)

# What nobody says who looks at an image, in lower case.
GIVEN = r"(?:information|context|text|data|details?|input|scene description|image description|descriptions?)"
MENTIONS = {
    r"\bcaptions?\b|\bcaptioned\b": "captions",
    r"\bbounding[ -]box(?:es)?\b|\bbbox(?:es)?\b|\bannotat(?:ions?|ed|ors?)\b": "boxes or annotations",
    r"\bcoordinates?\b|[\[(]\s*-?[01]?\.\d+\s*,\s*-?[01]?\.?\d*\s*,|\bx[12]\b|\by[12]\b": "coordinates",
    rf"\b(?:provided|given|available|supplied) {GIVEN}\b|\b{GIVEN} (?:that (?:is|was|were|are) )?(?:provided|given)\b":
        "what you were given",
    rf"\b(?:according to|based on|from) the {GIVEN}\b|\bin the (?:information|descriptions?|data)\b":
        "what you were given",
    rf"\b{GIVEN} (?:do(?:es)?(?: not|n't)|did(?: not|n't)) (?:say|mention|specify|state|tell|provide|indicate)\b":
        "what you were given",
    r"\b(?:is|are|was|were)(?: not|n't)? (?:mentioned|specified|stated)\b": "what you were given",
}  # fmt: skip
REFUSALS = (
    r"\bas an? (?:ai|artificial|language|text|large)\b|\blanguage model\b|"
    r"\bi(?:'m| am) (?:sorry|unable|not able)\b|\bi apologi[sz]e\b|\bi do(?: not|n't) have (?:access|the ability)\b|"
    r"\bi (?:cannot|can't|can not) (?:assist|help|fulfill?|comply|(?:see|view|access) (?:\w+ )?(?:image|photo|picture))"
)
MARKERS = (
    r"<image>|</?s>|<\|[^|]*\|>|\[/?inst\]|<</?sys>>|</?think>|={3,}|```|"
    r"^[^\w\n]*(?:question|answer|user|human|assistant|system|gpt)[^\w\n]*:"
)
_MENTIONS = [(re.compile(pattern), what) for pattern, what in MENTIONS.items()]
_REFUSALS = re.compile(REFUSALS)
_MARKERS = re.compile(MARKERS, re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+")


class Checker:
    """Parses and checks the answers of one kind."""

    def __init__(self, kind: str, prompt: Prompt, language: str | None = "en"):
        """
        Args:
          prompt: its system message and answers must not come back verbatim.
          language: "en", or None for any.
        """
        self.kind, self.language = kind, language
        texts = [prompt.system, *(answer for _, answer in prompt.examples)]
        self._prompt = {words for text in texts for words in _runs(_words(text))}

    def turns(self, text: str, finish_reason: str = "stop") -> list[Turn]:
        """The questions and answers of a reply; the question of a description is "".

        Raises:
          BadAnswer: the reply cannot be used.
        """
        if finish_reason in ("length", "max_tokens"):
            raise BadAnswer("it was too long and broke off before its end")
        if finish_reason == "content_filter":
            raise BadAnswer("a content filter stopped it")
        text = _bare(text)
        if not text:
            raise BadAnswer("it is empty")
        if len(text) > MAX_CHARACTERS:
            raise BadAnswer(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
        try:
            turns = parse_description(text) if self.kind == "detail" else parse_turns(text)
        except BadAnswer:
            if refusal := _REFUSALS.search(text.lower()):
                raise BadAnswer(f"it refuses ({refusal[0]!r})") from None
            raise
        self.check(turns)
        return turns

    def check(self, turns: list[Turn]) -> None:
        """Raises:
        BadAnswer: what was parsed breaks a rule.
        """
        (fewest, most), (shortest, longest) = LIMITS[self.kind]
        if not fewest <= len(turns) <= most:
            raise BadAnswer(f"it has {len(turns)} questions, and should have {fewest} to {most}")
        for question, answer in turns:
            if not answer or not (question or self.kind == "detail"):
                raise BadAnswer("a question or an answer is empty")
            if len(question) > MAX_QUESTION:
                raise BadAnswer(f"a question has more than {MAX_QUESTION} characters")
            if not shortest <= len(answer) <= longest:
                raise BadAnswer(f"an answer has {len(answer):,} characters, and should have {shortest} to {longest:,}")
        if len({question.casefold() for question, _ in turns}) < len(turns):
            raise BadAnswer("it asks the same question twice")
        text = "\n".join(part for turn in turns for part in turn).lower().replace("\u2019", "'")
        for pattern, what in _MENTIONS:
            if found := pattern.search(text):
                raise BadAnswer(f"it mentions {what} ({shorten(found[0], 40)!r}) instead of speaking about the image")
        if found := _REFUSALS.search(text) or _MARKERS.search(text):
            raise BadAnswer(f"it has {shorten(found[0], 40)!r} in it")
        if not self._prompt.isdisjoint(_runs(_words(text))):
            raise BadAnswer("it repeats the instructions or the examples")
        if self.language == "en" and not all(map(is_english, (text, *(answer for _, answer in turns)))):
            raise BadAnswer("it is not in English")


def is_english(text: str) -> bool:
    """Whether a text is in Latin letters and, if it is long enough to tell, has the frequent words of English."""
    words = _words(text)
    letters = [] if text.isascii() else [c for c in text if c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    frequent = sum(word in FREQUENT for word in words)
    return foreign <= FOREIGN * len(letters) and (len(words) < MIN_WORDS or frequent >= ENGLISH * len(words))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """All runs of `LEAKED_WORDS` words."""
    return zip(*(words[i:] for i in range(LEAKED_WORDS)), strict=False)


# ---------------------------------------------------------------- parsing

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*$", re.MULTILINE)
_HEADING = re.compile(
    r"^[\s#>*_\-\d.)(]*(?P<who>question|answer|[qa])\b[\s*_#.\d]*[::][ \t*_]*(?P<rest>.*)$", re.IGNORECASE
)
_BOLD = re.compile(r"(\*\*|__)(?=\S)(.{1,500}?)(?<=\S)\1")
_RULE = re.compile(r"^\s*(?:={3,}|-{3,}|\*{3,}|_{3,})\s*$")
_TITLE = re.compile(
    r"\A[\s#*_]*(?:(?:detailed|image|full|complete|the)\s+)*(?:description|answer)[\s*_#]*[::][\s*_]*", re.IGNORECASE
)
STRAY = "x"  # what is neither a question nor an answer
QUESTION_KEYS, ANSWER_KEYS = ("question", "q", "human", "user"), ("answer", "a", "gpt", "assistant", "response")


def _bare(text: str) -> str:
    """A reply without carriage returns, the thoughts before it, the fences around it, and bold type."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    return _BOLD.sub(r"\2", _FENCE.sub("", _THOUGHTS.sub("", text))).strip()


def parse_turns(text: str) -> list[Turn]:
    """Parse questions and answers: lines `Question:` and `Answer:` with `===` between them, or JSON.

    Raises:
      BadAnswer: they do not alternate, or there are none.
    """
    if text[0] in "[{":
        return _parse_json(text)
    parts: list[tuple[str, list[str]]] = []  # "q", "a" or STRAY, and lines
    is_open = False  # whether a line belongs to the last part
    for line in text.split("\n"):
        if found := _HEADING.match(line):
            parts.append((found["who"][0].lower(), [found["rest"]]))
            is_open = True
        elif _RULE.match(line):
            is_open = is_open and not any(map(str.strip, parts[-1][1]))  # a rule may follow a heading
        elif is_open:
            parts[-1][1].append(line)
        elif parts and line.strip():
            parts.append((STRAY, [line]))  # fine after the last answer alone
            is_open = True
    if parts and parts[-1][0] == STRAY:
        parts.pop()
    if not parts:
        raise BadAnswer("it has no line that begins with Question:")
    if "".join(who for who, _ in parts) != "qa" * (len(parts) // 2):
        raise BadAnswer("questions and answers do not alternate, or have other text between them")
    texts = ["\n".join(lines).strip() for _, lines in parts]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _parse_json(text: str) -> list[Turn]:
    try:
        value = parse_json(text)
    except InputError:
        raise BadAnswer("it is neither in the form Question: ... Answer: ... nor valid JSON") from None
    while isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), list):
        value = next(iter(value.values()))  # {"conversations": [...]}
    items = value if isinstance(value, list) else [value]
    said = [pair for item in items for pair in _said(item)]
    if not said or "".join(who for who, _ in said) != "qa" * (len(said) // 2):
        raise BadAnswer("it has no alternating questions and answers")
    return [(a[1], b[1]) for a, b in zip(said[::2], said[1::2], strict=True)]


def _said(item: Any) -> list[tuple[str, str]]:
    """The parts of a JSON object: `{"question", "answer"}`, or one of `{"from", "value"}`, `{"role", "content"}`."""
    if not isinstance(item, dict):
        return [(STRAY, "")]
    lower = {str(key).lower(): value for key, value in item.items()}
    for who, value in (("from", "value"), ("role", "content")):
        if who in lower and value in lower:
            lower = {str(lower[who]).lower(): lower[value]}
    pairs = []
    for who, keys in (("q", QUESTION_KEYS), ("a", ANSWER_KEYS)):
        pairs += [(who, lower[key].strip()) for key in keys if isinstance(lower.get(key), str)]
    return pairs or [(STRAY, "")]


def parse_description(text: str) -> list[Turn]:
    """Parse a description, without a heading.

    Raises:
      BadAnswer: it is a conversation.
    """
    if text[0] in "[{":
        try:
            value = parse_json(text)
            (text,) = [v for v in value.values() if isinstance(v, str)]
        except (InputError, AttributeError, ValueError):
            raise BadAnswer("it is not a description in plain text") from None
    if any(_HEADING.match(line) and _HEADING.match(line)["who"][0] in "qQ" for line in text.split("\n")):  # type: ignore[index]
        turns = parse_turns(text)
        if len(turns) > 1:
            raise BadAnswer("it is a conversation instead of a description")
        text = turns[0][1]
    return [("", _TITLE.sub("", text).strip())]


def retry_message(reason: str) -> str:
    """The message with which a model is asked again."""
    return (
        f"This cannot be used: {reason}. Please write all of it again for the same photograph, "
        "in the form that the instructions ask for, and nothing else."
    )
