"""Answers of language models: read in whatever form they come, and refused where they are no training data."""

import contextlib
import json
import random
import time

import pytest

from scripted_endpoint import FAULTS, FORMS, dress, spoil
from train.datasets.instruct.answers import BadAnswer, Checker, retry_message
from train.datasets.instruct.messages import KINDS, Prompt, read_prompt, read_questions

PROMPTS = {kind: read_prompt(None, kind) for kind in KINDS}
CHECKERS = {kind: Checker(kind, prompt) for kind, prompt in PROMPTS.items()}
TURNS = [("What is on the mat?", "A cat lies on it.\n\nIt seems to be asleep."), ("Is it day?", "Yes.")]
PLAIN = dress("plain", TURNS)
DESCRIPTION = (
    "A gray cat lies on a round mat in the middle of the room, with a bowl to the left of it and a door behind it."
)


def bad(text: str, kind: str = "conversation", finish_reason: str = "stop") -> str:
    with pytest.raises(BadAnswer) as found:
        CHECKERS[kind].turns(text, finish_reason)
    assert len(str(found.value)) < 150
    return str(found.value)


def with_answer(text: str) -> str:
    return dress("plain", [TURNS[0], ("What else?", text)])


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize("form", FORMS)
def test_questions_and_answers_in_the_forms_of_models(form):
    turns = [(question, answer.replace("\n\n", " ")) for question, answer in TURNS]
    assert CHECKERS["conversation"].turns(dress(form, turns)) == turns


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.removesuffix("===\n"),
        PLAIN.replace("===\n", ""),
        PLAIN.replace("===", "====="),
        PLAIN.replace("===", "---"),
        PLAIN.replace("\n", "\n\n").replace("===", " === "),
        PLAIN.replace("Question:\n", "### Question 1: ").replace("Answer:\n", "### Answer 1: "),
        PLAIN.replace("Question:\n", "**Question:** ").replace("Answer:\n", "__Answer__: "),
        PLAIN.replace("Question:\n", "**Q**: ").replace("Answer:\n", "- **A:** "),
        PLAIN.replace("Question:\n", "1) Q: ").replace("Answer:\n", "> A: "),
        PLAIN.replace("Question:", "QUESTION :").replace("Answer:", "answer:"),
        PLAIN.replace("cat", "**cat**"),
        f"Here you are:\n\n{PLAIN}\n\nI hope that this helps!",
        f"\ufeff\n```\n{PLAIN}```\n",
        f"<think>A cat?\nQuestion: no</think>{PLAIN}",
    ],
)
def test_other_forms_of_the_same(text):
    def joined(turns):
        return [(question, " ".join(answer.split())) for question, answer in turns]

    assert joined(CHECKERS["conversation"].turns(text)) == joined(TURNS)


@pytest.mark.parametrize(
    "value",
    [
        [{"question": q, "answer": a} for q, a in TURNS],
        [{"Q": q, "A": a} for q, a in TURNS],
        [{"from": who, "value": text} for turn in TURNS for who, text in zip(("human", "gpt"), turn, strict=True)],
        [
            {"role": who, "content": text}
            for turn in TURNS
            for who, text in zip(("user", "assistant"), turn, strict=True)
        ],
        {"conversations": [{"Question": q, "Answer": a} for q, a in TURNS]},
    ],
)
def test_json(value):
    assert CHECKERS["conversation"].turns(f"```json\n{json.dumps(value, indent=1)}\n```") == TURNS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A cat lies on a mat.", "no line that begins with Question:"),
        ("Question: a", "do not alternate"),
        (f"{PLAIN}Question:\nAnd why?\n===\n", "do not alternate"),
        (PLAIN.replace("Question:", "Answer:"), "do not alternate"),
        (PLAIN.replace("Answer:", "Question:"), "do not alternate"),
        (PLAIN.replace("===\nQuestion", "===\nNow the next one.\nQuestion"), "other text between them"),
        (PLAIN.replace("Yes.", ""), "is empty"),
        (dress("plain", TURNS[:1]), "has 1 questions, and should have 2 to 20"),
        (dress("plain", [(f"{i}?", "Yes.") for i in range(21)]), "has 21 questions"),
        (dress("plain", [TURNS[0], TURNS[0]]), "the same question twice"),
        (dress("plain", [TURNS[0], ("What? " * 100, "Yes.")]), "a question has more than 500 characters"),
        (with_answer("It is. " * 300), "an answer has 2,099 characters, and should have 1 to 1,500"),
        (with_answer("It is. " * 9000), "it has 63,"),
        ("[", "neither in the form"),
        ("[" * 10**4, "neither in the form"),
        ('[{"question": "a"}]', "no alternating"),
        ('[{"question": 1, "answer": 2}]', "no alternating"),
        ("[1, null]", "no alternating"),
        ('{"a": []}', "no alternating"),
        ("[]", "no alternating"),
    ],
)
def test_what_is_no_conversation(text, reason):
    assert reason in bad(text)


def test_descriptions():
    turns = CHECKERS["detail"].turns
    for text in (
        DESCRIPTION,
        f"**Description:** {DESCRIPTION}",
        f"## Detailed Description\n\n{DESCRIPTION}".replace("Description\n", "Description:\n"),
        f"Question:\nWhat is there?\n===\nAnswer:\n{DESCRIPTION}\n===",
        json.dumps({"description": DESCRIPTION}),
    ):
        assert turns(text) == [("", DESCRIPTION)]
    assert turns(f"{DESCRIPTION}\n\n{DESCRIPTION}")[0][1].count("\n\n") == 1
    assert "a conversation instead" in bad(PLAIN, "detail")
    assert "has 10 characters, and should have 100 to 5,000" in bad("A gray cat", "detail")
    assert "not a description in plain text" in bad('["a", "b"]', "detail")


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(kind, fault):
    turns = (
        [("", DESCRIPTION)] if kind == "detail" else [("Why is that?", DESCRIPTION)] * (kind == "reasoning") or TURNS
    )
    assert CHECKERS[kind].turns(dress("plain", turns, kind))
    text, finish_reason = spoil(fault, turns, PROMPTS[kind].messages("A cat."), kind)
    assert bad(text, kind, finish_reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The captions say so.", "mentions captions ('captions')"),
        ("The bounding box of it is large.", "boxes or annotations"),
        ("It is annotated as a cat.", "boxes or annotations"),
        ("Its coordinates are on the left.", "coordinates"),
        ("It is at [0.12, 0.3, 0.5, 0.61].", "coordinates ('[0.12, 0.3,')"),
        ("It is at (0.1, 1, 0.5, 0.61).", "coordinates"),
        ("Based on the provided information, yes.", "what you were given"),
        ("According to the description it is.", "what you were given"),
        ("From the context it is a cat.", "what you were given"),
        ("The information does not specify that.", "what you were given"),
        ("The descriptions don\u2019t mention it.", "what you were given"),
        ("The color is not mentioned.", "what you were given"),
        ("With the text given, it is.", "what you were given"),
        ("As an AI, I would say yes.", "'as an ai'"),
        ("I'm sorry, that is unclear.", "i'm sorry"),
        ("I cannot see the image.", "i cannot see the image"),
        ("I can\u2019t assist with that.", "i can't assist"),
        ("It is <image> here.", "'<image>'"),
        ("Yes.</s>", "'</s>'"),
        ("Yes.<|im_end|>", "'<|im_end|>'"),
        ("Yes. [/INST]", "'[/inst]'"),
        ("Yes.\nUSER: And now?", "'user:'"),
        ("Yes.\n**Assistant:** It is.", "'assistant:'"),
        (PROMPTS["conversation"].system[:120], "repeats the instructions"),
        (
            "Indeed: " + PROMPTS["conversation"].examples[0][1].splitlines()[4],
            "repeats the instructions or the examples",
        ),
        (
            "\u732b\u304c\u3044\u307e\u3059\u3002\u3068\u3066\u3082\u304b\u308f\u3044\u3044\u732b\u3067\u3059\u3002"
            * 4,
            "not in English",
        ),
        (
            "Die Katze liegt auf der Matte und schl\u00e4ft, weil sie den ganzen Tag gespielt hat. " * 2,
            "not in English",
        ),
    ],
)
def test_answers_that_are_no_training_data(answer, reason):
    assert reason in bad(with_answer(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "No, I do not see any dogs.",
        "There are 3 cats, 2 of them (the gray ones) asleep.",
        "The sign reads \u201cCaf\u00e9 M\u00fcller\u201d.",
        "Its boxes are brown, and stand in a row.",
        "The answer: nobody knows.",
        "Three.",
        "3",
        "The scores are (1.5, 2 and 3).",
        "The man is given a cup, and the text on it is red.",
    ],
)
def test_answers_that_only_look_like_it(answer):
    assert CHECKERS["conversation"].turns(with_answer(answer))[1][1] == answer


def test_finish_reasons():
    assert "too long and broke off" in bad(PLAIN, finish_reason="length")
    assert "content filter" in bad(PLAIN, finish_reason="content_filter")
    for reason in ("stop", "", "eos_token"):
        assert CHECKERS["conversation"].turns(PLAIN, reason) == TURNS


def test_other_languages_and_prompts():
    german = dress("plain", [("Was liegt da?", "Eine Katze liegt auf der Matte. " * 5), ("Ist es Tag?", "Ja.")])
    assert bad(german) == "it is not in English"
    own = Prompt("one two three four five six seven eight nine ten", ())
    assert len(Checker("conversation", own, None).turns(german)) == 2
    with pytest.raises(BadAnswer, match="repeats"):
        Checker("conversation", own, None).turns(with_answer("One, two, three, four; five six seven eight nine TEN!"))
    Checker("conversation", own, None).turns(with_answer("Two three four five six seven eight nine ten."))


def test_our_own_examples_would_pass():
    for kind, prompt in PROMPTS.items():
        other = Checker(kind, Prompt("", ()))
        for _, answer in prompt.examples:
            assert other.turns(answer)
        assert len(prompt.examples) >= 2 + (kind != "conversation")
    assert len(set(read_questions(None))) >= 16
    assert retry_message("it is empty").startswith("This cannot be used: it is empty. ")


def test_hostile_replies_take_no_time():
    pieces = ["**", "__", "*", "\n", "Question:", "Answer:", "===", "[", "{", "<|", "|", "(", " ", "0.1, ", "#", "**a "]
    pick, start = random.Random(0), time.process_time()
    texts = [piece * (49_000 // len(piece)) for piece in pieces]
    texts += ["".join(pick.choices(pieces, k=9000)) for _ in range(3)]
    for text in texts:
        for kind in ("conversation", "detail"):
            with contextlib.suppress(BadAnswer):
                CHECKERS[kind].turns(f"Question: a\nAnswer: {text}")
    assert time.process_time() - start < 30  # seconds; with a quadratic pattern some minutes
