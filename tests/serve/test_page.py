"""The page that the server has at `/`. What it does in a browser is tried by `benchmarks/page.py`; here are its source,
and the parts of its script that need no browser, run by the Node.js that comes with playwright's wheel."""

import base64
import hashlib
import json
import random
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import playwright
import pytest

from helpers import ROOT

PAGE = (ROOT / "infer" / "serve" / "page.html").read_text()
NODE = Path(playwright.__file__).parent / "driver" / "node"
VOID = {"meta", "link", "input", "br", "circle", "path", "rect"}
CONTROLS = {"button", "input", "textarea", "dialog", "form"}


class Reader(HTMLParser):
    """Attributes of the elements in document order, and the texts in each; fails if an element is not closed."""

    def __init__(self):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[int] = []
        self.feed(PAGE)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        within = [self.elements[i][0] for i in self._open]
        self.elements.append((tag, dict(attrs) | {"within": " ".join(within)}, []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for i in self._open:
            self.elements[i][2].append(data)


ELEMENTS = Reader().elements
IDS = [attributes["id"] for _, attributes, _ in ELEMENTS if "id" in attributes]


def content(tag: str) -> str:
    (found,) = ["".join(texts) for name, _, texts in ELEMENTS if name == tag]
    return found


SCRIPT, STYLE = content("script"), content("style")


def test_nothing_comes_from_elsewhere():
    addresses = set(re.findall(r"\b(?:https?:|wss?:)?//[\w.]+[^\s'\"]*", PAGE.replace("// ", "")))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name of the icon's format
    assert not re.search(
        r"@import|url\(|\bimport\b|importScripts|WebSocket|EventSource|sendBeacon|XMLHttpRequest", PAGE
    )
    for _, attributes, _ in ELEMENTS:
        assert (
            attributes.get("href", "data:").startswith("data:")
            and "src" not in attributes
            and "action" not in attributes
        )
    assert re.findall(r'(?:fetch|request)\((?:path|"([^"]*)")', SCRIPT) == ["", "", "v1/chat/completions", "v1/models"]


def test_a_policy_of_hashes_allows_it():
    """One script and one style, whose text is hashed; no inline handlers and style attributes, which it would not."""
    for tag, text in (("script", SCRIPT), ("style", STYLE)):
        (raw,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert raw == text and len(base64.b64encode(hashlib.sha256(raw.encode()).digest())) == 44
    for tag, attributes, _ in ELEMENTS:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
    assert not re.search(r"\beval\(|new Function|setTimeout\(\"|javascript:|\.setAttribute\(\"style", SCRIPT)


def test_text_is_shown_as_text():
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML"
    )
    assert not re.search(forbidden, PAGE)


def test_what_it_refers_to_exists():
    assert len(set(IDS)) == len(IDS)
    used = set(re.findall(r'\$\("([\w-]+)"\)|setting\("(\w+)"\)', SCRIPT))
    assert {a or b for a, b in used} <= set(IDS)
    assert set(re.findall(r"#([a-z][\w-]*)[ .:,{]", STYLE)) <= set(IDS)
    for _, attributes, _ in ELEMENTS:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert {*attributes.get(name, "").split()} <= set(IDS)
    assert "var(--" in STYLE and set(re.findall(r"var\((--[\w-]+)\)", STYLE)) <= set(re.findall(r"(--[\w-]+):", STYLE))


def test_controls_have_names():
    for tag, attributes, texts in ELEMENTS:
        if tag in CONTROLS and "hidden" not in attributes and attributes.get("method") != "dialog":
            named = {"aria-label", "aria-labelledby"} & {*attributes} or "".join(texts).strip()
            assert named or "label" in attributes["within"].split(), (tag, attributes)
        if tag == "svg":
            assert attributes["aria-hidden"] == "true"
        if tag == "button":
            assert attributes["type"] in ("button", "submit")


def test_it_is_small():
    assert len(PAGE.encode()) < 40_000 and PAGE.count("\n") < 800
    assert max(map(len, PAGE.splitlines())) <= 120


# ---------------------------------------------------------------- contrast


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_contrast(scheme):
    """WCAG AA: 4.5 for text, 3 for the borders of fields and for the focus ring."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]{3,6})", blocks[scheme == "dark"]))
    pairs = [(text, ground, 4.5) for text in ("text", "muted") for ground in ("page", "surface", "sunken")]
    pairs += [
        ("text", "tint", 4.5),
        ("on-accent", "accent", 4.5),
        ("alert-text", "alert", 4.5),
        ("alert-text", "page", 4.5),
    ]
    pairs += [(line, ground, 3) for line in ("field", "accent") for ground in ("page", "surface")]
    for one, other, least in pairs:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        assert (high + 0.05) / (low + 0.05) >= least, (one, other)


# ---------------------------------------------------------------- the script, without a browser

# As much of a document as the script needs to start and to render: an element keeps its tag and its children.
DOCUMENT = """
class Element {
    constructor(tag) { this.localName = tag; this.childNodes = []; this.value = ""; this.validity = {valid: true}; }
    append(...nodes) {
        this.childNodes.push(...nodes.filter((node) => node !== ""));
        for (const node of nodes) if (node instanceof Element) node.parent = this;
    }
    replaceChildren(...nodes) { this.childNodes = []; this.append(...nodes); }
    remove() { this.parent.childNodes.splice(this.parent.childNodes.indexOf(this), 1); }
    get lastChild() { return this.childNodes.at(-1); }
    addEventListener() {}
    focus() {}
    toJSON() { return [this.localName, ...this.childNodes]; }
}
const ids = {};
globalThis.document = {
    getElementById: (id) => ids[id] ??= new Element("p"),
    createElement: (tag) => new Element(tag),
    addEventListener() {},
};
"""


def run(code: str, inputs: list) -> list:
    """What the page's script and then a function return for each input."""
    program = f"""{DOCUMENT}
{SCRIPT}
const run = {code}, inputs = JSON.parse(require("fs").readFileSync(0));
Promise.all(inputs.map(run)).then((found) => {{ console.log(JSON.stringify(found)); process.exit(0); }});"""
    found = subprocess.run(
        [NODE, "-e", program], input=json.dumps(inputs), capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


RENDER = """(pieces) => {
    const node = element("div");
    pieces.forEach((_, i) => render(node, pieces.slice(0, i + 1).join("")));
    return node.childNodes; }"""
MARKDOWN = {
    "one\ntwo\n\nthree": [["p", "one\ntwo"], ["p", "three"]],
    "a **b `c`** `d`": [["p", "a ", ["strong", "b ", ["code", "c"]], " ", ["code", "d"]]],
    "## A **b**\ntext": [["h3", "A ", ["strong", "b"]], ["p", "text"]],
    "- a\n- b\n  more\n\n- c\n\nend": [["ul", ["li", "a"], ["li", "b", "\nmore"], ["li", "c"]], ["p", "end"]],
    "1. a\n   - b\n   - c\n2) d": [["ol", ["li", "a", ["ul", ["li", "b"], ["li", "c"]]], ["li", "d"]]],
    "- a\n1. b": [["ul", ["li", "a"]], ["ol", ["li", "b"]]],
    "```py\n**x**\n\n- y\n```\nz": [["pre", ["code", "**x**\n\n- y"]], ["p", "z"]],
    "```\nnot closed": [["pre", ["code", "not closed"]]],
    "2 ** 3 * 4 `": [["p", "2 ** 3 * 4 `"]],
    "<b>x</b> [a](javascript:b)": [["p", "<b>x</b> [a](javascript:b)"]],
    "": [],
}


def test_markdown():
    found = run(RENDER, [[text] for text in MARKDOWN])
    for (text, expected), node in zip(MARKDOWN.items(), found, strict=True):
        assert node == expected, text


def test_text_that_grows_looks_as_if_it_had_come_at_once():
    rng = random.Random(0)
    marks = ["`", "**", "# ", "- ", "1. ", "  - ", "    ", "```\n", "\n", "\n\n", "<b>", "語", "word "]
    texts = [[rng.choice(marks) for _ in range(rng.randrange(40))] for _ in range(200)]
    grown, once = run(RENDER, texts), run(RENDER, [["".join(pieces)] for pieces in texts])
    assert grown == once and len({json.dumps(nodes) for nodes in once}) > 150


READ = """async ([bytes, size]) => {
    const chunks = [];
    for (let i = 0; i < bytes.length; i += size) chunks.push(new Uint8Array(bytes.slice(i, i + size)));
    const found = [];
    try { for await (const event of readEvents(ReadableStream.from(chunks))) found.push(event); }
    catch (error) { found.push(error.message); }
    return found; }"""


def test_events():
    """However the network splits them, also inside of a character, until [DONE]; without it the stream broke off."""
    text = 'data: {"a": "語"}\r\n\r\n: keep-alive\n\nevent: x\ndata:1\ndata: 2\n\n'
    done = [[list((text + "data: [DONE]\n\ndata: no\n\n").encode()), size] for size in range(1, 40)]
    assert run(READ, done) == [['{"a": "語"}', "1\n2"]] * len(done)
    (broken,) = run(READ, [[list(text.encode()), 7]])
    assert broken[:-1] == ['{"a": "語"}', "1\n2"] and broken[-1].startswith("The connection to the server was lost")
