"""A page of wrong answers to look at, as one HTML file that loads nothing.

Answers are untrusted text: all of it is escaped, and the page's policy allows its own script, by its hash, and images
that it contains.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from infer.benchmarks.benchmark import Mark, Question
from infer.benchmarks.files import IMAGE_LINE
from infer.benchmarks.scoring import find_question
from llava_jax.console import InputError, plural
from llava_jax.data.images import open_image

TEMPLATE = Path(__file__).parent / "evaluation_page.html"
RIGHT = 0.5  # answers with this score or more are not shown
MAX_ANSWERS, MAX_IMAGES, MAX_IMAGE_BYTES = 1000, 300, 12 * 2**20
MAX_CHARACTERS = 4000  # of a text
SIDE, QUALITY = 320, 80  # of images


def wrong_page(title: str, about: str, marks: Sequence[Mark], questions: Sequence[Question]) -> bytes:
    """The page of those marks that score less than `RIGHT`.

    Args:
      about: a sentence about the run.
      questions: for their images and texts.
    """
    find = find_question(questions)
    wrong = [mark for mark in marks if mark.score < RIGHT]
    shown = choose(wrong, MAX_ANSWERS)
    images, sections = _Images(), []
    for sources, some in _by_image(shown, find):
        figures = "".join(images.figure(source) for source in sources)
        articles = "".join(_article(mark, find(mark)) for mark in some)
        figures = f"<div>{figures}</div>" if figures else ""
        sections.append(f"<section{'' if figures else ' class=plain'}>{figures}<div>{articles}</div></section>")
    summary = [about, f"{len(wrong):,} of {plural(len(marks), 'answer')} score below {RIGHT:g}."]
    if len(shown) < len(wrong):
        summary.append(f"{len(shown):,} are shown, of each kind alike; {len(wrong) - len(shown):,} are left out.")
    if images.left_out:
        summary.append(f"{plural(images.left_out, 'image')} left out, to keep the file small.")
    counts = {kind: sum(mark.kind == kind for mark in shown) for kind in sorted({mark.kind for mark in shown})}
    kinds = f'<option value="">all ({len(shown):,})</option>' + "".join(
        f'<option value="{_escape(kind)}">{_escape(kind)} ({n:,})</option>' for kind, n in counts.items()
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    values = {
        "policy": _policy(template),
        "title": _escape(f"Wrong answers: {title}"),
        "summary": "\n".join(f"<p>{_escape(line)}</p>" for line in summary),
        "kinds": kinds,
        "sections": "\n".join(sections) or "<p>None.</p>",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template).encode(errors="replace")


def choose(marks: Sequence[Mark], limit: int) -> list[Mark]:
    """At most `limit` marks, of each kind about as many, in their order."""
    kinds: dict[str, list[int]] = {}
    for number, mark in enumerate(marks):
        kinds.setdefault(mark.kind, []).append(number)
    ranked = sorted((place, number) for numbers in kinds.values() for place, number in enumerate(numbers))
    return [marks[number] for number in sorted(number for _, number in ranked[:limit])]


def _by_image(
    marks: Iterable[Mark], find: Callable[[Mark], Question | None]
) -> list[tuple[tuple[Any, ...], list[Mark]]]:
    """Marks grouped by the images of their questions."""
    groups: dict[Any, tuple[tuple[Any, ...], list[Mark]]] = {}
    for number, mark in enumerate(marks):
        question = find(mark)
        images = question.images if question else ()
        groups.setdefault(images or number, (images, []))[1].append(mark)
    return list(groups.values())


def _article(mark: Mark, question: Question | None) -> str:
    asked = question.turns[-1].removeprefix(IMAGE_LINE) if question and question.turns else mark.prompt
    problem = question.problem if question else ""
    given = _text(mark.text) if mark.text else f'<span class="missing">{_text(problem or "no answer")}</span>'
    rows = [("Answer", "wrong", given)]
    if mark.read != mark.text:
        rows.append(("Read as", "", _text(mark.read) if mark.read else '<span class="missing">nothing</span>'))
    if mark.answer:
        rows.append(("Right answer", "right", _text(mark.answer)))
    parts = "".join(f'<dt>{name}</dt><dd class="{kind}" dir="auto">{text}</dd>' for name, kind, text in rows)
    about = f"question {mark.question}, {mark.kind}, score {mark.score:g}"
    return (
        f'<article tabindex="-1" data-kind="{_escape(mark.kind)}"><p class="question" dir="auto">{_text(asked)}</p>'
        f'<dl>{parts}</dl><p class="about">{_text(about)}</p></article>\n'
    )


class _Images:
    """Downscaled images as `data:` URLs, bounded in number and bytes."""

    def __init__(self):
        self.number = self.bytes = self.left_out = 0

    def figure(self, source: Any) -> str:
        name = "image in the benchmark's file" if isinstance(source, bytes) else Path(str(source)).name
        if self.number == MAX_IMAGES or self.bytes >= MAX_IMAGE_BYTES:
            self.left_out += 1
            return f"<figure><figcaption>{_text(name)} (left out)</figcaption></figure>"
        try:
            data, width, height = _thumbnail(source)
        except InputError:
            return f"<figure><figcaption>{_text(name)} (cannot be read)</figcaption></figure>"
        self.number += 1
        self.bytes += len(data)
        url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        return (
            f'<figure><img src="{url}" width="{width}" height="{height}" alt="{_escape(name)}" loading="lazy">'
            f"<figcaption>{_text(name)}</figcaption></figure>"
        )


def _thumbnail(source: Any) -> tuple[bytes, int, int]:
    """An image as a small JPEG, and its size.

    Raises:
      InputError: it cannot be read.
    """
    image = open_image(source if isinstance(source, bytes) else Path(str(source)))  # a path: nothing is downloaded
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), image.width, image.height


def _policy(template: str) -> str:
    """The content security policy: the page's own script and style, by their hashes, and `data:` images."""

    def hashed(tag: str) -> str:
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _escape(text: str) -> str:
    """Text for an attribute or an element; control characters, which HTML does not allow, become boxes."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text))


def _text(text: object) -> str:
    """Text for an element, shortened."""
    text = str(text)
    more = f" ... ({len(text) - MAX_CHARACTERS:,} more characters)" if len(text) > MAX_CHARACTERS else ""
    return _escape(text[:MAX_CHARACTERS] + more)
