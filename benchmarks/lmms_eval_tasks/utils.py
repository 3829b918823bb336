"""What the tasks of this folder do with a document: {"images", "question", "answer", "choices"}."""

from PIL import Image


def images(document):
    return [Image.open(path) for path in document["images"]]


def right_choice(document):
    return document["choices"].index(document["answer"])


def exact_match(document, results):
    answer, right = (text.strip().lower().removesuffix(".").rstrip() for text in (results[0], document["answer"]))
    return {"accuracy": float(answer == right)}


def rounds(document, round_idx=None, previous_output=None, previous_round_info=None):
    """Chat messages; after the first round with what lmms-eval wants to know: (messages, ended, answers, memory)."""
    question = document["question"]
    if round_idx is None:
        return _ask(document, question)
    ended = round_idx == 2
    return None if ended else _ask(document, f"Is it {previous_output[0]}?"), ended, previous_output, None


def _ask(document, text):
    parts = [{"type": "image", "url": image} for image in images(document)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def exact_match_of_rounds(document, results):
    answers = results[0]
    return exact_match(document, answers) | {"rounds": len(answers)}
