"""The page of wrong answers: whatever they are, it shows them, and nothing of them runs."""

import base64
import hashlib
import io
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import playwright
import pytest
from PIL import Image

from helpers import image_file
from infer import evaluation_page
from infer.benchmarks.benchmark import Mark, Question
from infer.evaluation_page import choose, wrong_page

NODE = Path(playwright.__file__).parent / "driver" / "node"
ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">"\'>&amp;</dd></article>{{policy}}\x00\u202e'
VOID = {"meta", "input", "img", "br"}


class Page(HTMLParser):
    """Elements with their attributes and texts; fails if one is not closed where it should be."""

    def __init__(self, data: bytes):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(data.decode())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def find(self, name: str) -> list:
        return [(attributes, "".join(texts)) for tag, attributes, texts in self.elements if tag == name]


def ask(number, images=(), **fields) -> Question:
    return Question(number, (f"What is {number}?",), f"What is {number}?", images, **fields)


def mark(question: Question, text="no", score=0.0, **fields) -> Mark:
    return Mark(question.id, question.prompt, text, score, **{"answer": "yes", "kind": "all"} | fields)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (1000, 500), "red").save(path)
    return path


def test_wrong_answers_are_shown_with_their_images(image):
    data = image_file(Image.new("RGB", (30, 40), "blue"), "PNG")
    questions = [ask(0, (str(image),)), ask(1, (data,)), ask(2), ask(3, (str(image),), problem="file line 3: no image")]
    marks = [
        mark(questions[0], "no.", read="no", kind="colour"), mark(questions[1], "right", 1.0),
        mark(questions[2], "half", 0.5), mark(questions[3], "", kind="count", score=0.49),
        mark(ask(4), "?", read="?"),  # a mark without a question
    ]  # fmt: skip
    page = Page(wrong_page("POPE", "m, reference protocol.", marks, questions))
    assert [re.sub(r"\s", "", text) for _, text in page.find("article")] == [
        "Whatis0?Answerno.ReadasnoRightansweryesquestion0,colour,score0",
        "Whatis3?Answerfileline3:noimageRightansweryesquestion3,count,score0.49",
        "Whatis4?Answer?Rightansweryesquestion4,all,score0",
    ]
    assert len(page.find("section")) == 2  # questions about one image stand beside it
    [(attributes, _)] = page.find("img")
    assert attributes["alt"] == "a.png" and attributes["src"].startswith("data:image/jpeg;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
    assert small.size == (320, 160) == (int(attributes["width"]), int(attributes["height"]))
    assert [text for _, text in page.find("option")] == ["all (3)", "all (1)", "colour (1)", "count (1)"]
    summary = " ".join(text for _, text in page.find("p"))
    assert "m, reference protocol. 3 of 5 answers score below 0.5." in summary and "left out" not in summary


def test_everything_is_escaped(image, tmp_path):
    name = tmp_path / "<img onload=alert(3)>&.png"
    image.rename(name)
    question = Question(ATTACK, (ATTACK,), ATTACK, (str(name),), kind=ATTACK, answer=ATTACK)
    attacked = Mark(ATTACK, ATTACK, ATTACK, 0.0, ATTACK + "read", ATTACK, ATTACK)
    data = wrong_page(ATTACK, ATTACK, [attacked], [question])
    page, clean = Page(data), Page(wrong_page("t", "a", [mark(ask(1))], [ask(1)]))
    shown = ATTACK.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    [(attributes, text)] = page.find("article")
    assert attributes["data-kind"] == shown and text.count(shown) == 6
    for tag in ("script", "style", "meta", "input", "link", "base", "form", "iframe", "a"):
        assert page.find(tag) == clean.find(tag)
    assert len(page.find("img")) == 1 and page.find("img")[0][0]["alt"] == name.name
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]


def test_the_policy_allows_the_page_itself_and_nothing_else():
    data = wrong_page("t", "a", [mark(ask(1))], [ask(1)])
    page = Page(data)
    policy = next(a["content"] for a, _ in page.find("meta") if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("script", "style"):
        [(attributes, text)] = page.find(tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert attributes == {} and f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "img-src data:;" in policy and "unsafe" not in policy
    assert not re.search(rb"https?:|//[a-z]|@import|url\(", data)
    assert not [a for _, a, _ in page.elements if "style" in a or "src" in a]
    assert "color-scheme" in {a.get("name") for a, _ in page.find("meta")} and b"prefers-color-scheme: dark" in data


def test_images_and_answers_are_bounded(image, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MAX_IMAGES", 2)
    monkeypatch.setattr(evaluation_page, "MAX_ANSWERS", 6)
    sources = [(image_file(Image.new("RGB", (20, 20 + i)), "PNG"),) for i in range(9)]
    questions = [ask(i, source) for i, source in enumerate(sources)] + [ask(9, (b"broken",)), ask(10, ("none.png",))]
    marks = [mark(one, kind="ab"[one.id == 8], text="x" * 5000) for one in questions]
    page = Page(wrong_page("t", "a", marks, questions))
    assert len(page.find("img")) == 2
    summary = " ".join(text for _, text in page.find("p"))
    assert "6 are shown, of each kind alike; 5 are left out. 4 images left out" in summary
    assert [attributes["data-kind"] for attributes, _ in page.find("article")] == ["a"] * 5 + ["b"]
    assert "(1,000 more characters)" in page.find("article")[0][1]
    page = Page(wrong_page("t", "a", marks[9:], questions))
    assert [text for _, text in page.find("figcaption")] == [
        "image in the benchmark's file (cannot be read)", "none.png (cannot be read)",
    ]  # fmt: skip
    monkeypatch.setattr(evaluation_page, "MAX_IMAGE_BYTES", 1)
    assert len(Page(wrong_page("t", "a", marks[:3], questions)).find("img")) == 1


def test_kinds_are_chosen_alike():
    marks = [mark(ask(i), kind=kind) for i, kind in enumerate("aaaaaabbc")]
    assert [one.kind for one in choose(marks, 6)] == list("aaabbc")
    assert choose(marks, 9) == marks


def test_the_script_filters_and_moves():
    """In Node.js, on as much of a page as it uses."""
    [(_, script)] = Page(wrong_page("t", "a", [], [])).find("script")
    page = r"""
const nodes = ["Red one", "red two", "blue"].map((textContent, i) =>
  ({textContent, dataset: {kind: "ab"[i % 2]}, hidden: false, focus() { document.activeElement = this; }}));
const make = () => ({value: "", listeners: {}, addEventListener(name, f) { this.listeners[name] = f; },
  focus() { document.activeElement = this; }, blur() { document.activeElement = null; }});
const ids = {search: make(), kind: make(), count: {}};
const section = {querySelector: () => nodes.find(article => !article.hidden)};
var document = {...make(), activeElement: null, getElementById: id => ids[id],
  querySelectorAll: tag => tag === "section" ? [section] : nodes};
"""
    steps = r"""
const visible = () => articles.map(article => +!article.hidden).join("");
const shown = () => `${visible()} ${count.textContent} ${!section.hidden}`;
const key = (key, target = document.activeElement) => document.listeners.keydown({key, target, preventDefault() {}});
const focused = () => articles.indexOf(document.activeElement);
const out = [shown()];
search.value = "RED o"; search.listeners.input(); out.push(shown());
search.value = "red"; kind.value = "b"; kind.listeners.change(); out.push(shown());
search.value = "green"; search.listeners.input(); out.push(shown());
kind.value = ""; key("Escape", search); out.push(shown());
search.value = "e"; kind.value = "a"; search.listeners.input();
for (const k of ["j", "j", "j", "k", "x"]) { key(k); out.push(focused()); }
key("/"); out.push(document.activeElement === search); key("j"); out.push(document.activeElement === search);
console.log(out.join("\n"));
"""
    ran = subprocess.run([NODE, "-"], input=page + script + steps, capture_output=True, text=True)
    assert ran.stdout.split("\n")[:-1] == [
        "111 3 of 3 true", "110 2 of 3 true", "010 1 of 3 true", "000 0 of 3 false", "111 3 of 3 true",
        "0", "2", "2", "0", "0", "true", "true",
    ], ran.stderr  # fmt: skip
