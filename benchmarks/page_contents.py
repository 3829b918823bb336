"""What `benchmarks/page.py` checks of what goes through the page: images, errors, text."""

import random
import re

import numpy as np
import page_server
from page_checks import EXAMPLE, Visitor, sent
from page_server import images_of
from PIL import Image

# ---------------------------------------------------------------- images


DROP = """(data) => {
    const transfer = new DataTransfer();
    for (const [name, type, bytes] of data.files) transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
    const event = data.paste ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
                             : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
    (data.paste ? $("question") : document.body).dispatchEvent(event);
    return event.defaultPrevented; }"""


def check_attach(v: Visitor) -> None:
    """Images are dropped, pasted and chosen, keep their order, and can be removed with the keyboard."""
    files = [["a.png", "image/png", list(EXAMPLE.read_bytes())], ["b.png", "image/png", list(EXAMPLE.read_bytes())]]
    assert v.js(DROP, {"files": files, "paste": False}) and v.js(DROP, {"files": files[:1], "paste": True})
    v.until("() => attached.length === 3")
    v.attach(v.image("c.jpg", (64, 48)))
    names = [image.get_attribute("alt") for image in v.page.locator("#attached img").all()]
    assert names == ["a.png", "b.png", "a.png", "c.jpg"], names
    v.page.get_by_role("button", name="Remove b.png").focus()
    v.page.keyboard.press("Enter")
    assert v.js("() => document.activeElement.ariaLabel") == "Remove a.png"
    v.page.get_by_role("button", name="Remove c.jpg").click()
    assert v.page.locator("#attached li").count() == 2
    assert v.js(DROP, {"files": [["notes.txt", "text/plain", [104, 105]]], "paste": False})
    v.page.wait_for_selector("#notice span")
    assert "notes.txt is not an image" in v.text("#notice")
    v.page.get_by_role("button", name="Dismiss").click()
    assert not v.text("#notice") and v.page.locator("#attached li").count() == 2


def check_sent_images(v: Visitor) -> None:
    """Large ones are scaled down, rotated ones are turned, transparent ones are on white, odd ones are kept."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    clear = v.folder / "clear.png"
    Image.new("RGBA", (40, 30), (200, 0, 0, 0)).save(clear)
    noise = v.folder / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)).save(noise)
    paths = [
        v.image("large.jpg", (5000, 1250)), v.image("turned.jpg", (300, 200), exif=exif), clear,
        v.image("line.png", (3000, 1)), v.image("dot.png", (1, 1)), noise,
    ]  # fmt: skip
    v.attach(*paths)
    v.ask("What are these?")
    found = images_of(sent(v)["messages"][0])
    sizes = [(2048, 512), (200, 300), (40, 30), (2048, 1), (1, 1), (1500, 1500)]
    assert [image.size for image in found] == sizes, [image.size for image in found]
    assert [image.format for image in found] == ["JPEG", "JPEG", "PNG", "PNG", "PNG", "JPEG"]
    large, turned, white = (np.asarray(image.convert("RGB")).astype(int) for image in found[:3])
    assert abs(large[256, 1024, :2] - 127).max() < 8 and large[0, 0].max() < 8, "another image"
    assert turned[5, 195, :2].max() < 12 and turned[295, 195, 0] > 243, "not upright"
    assert (white == 255).all()


# ---------------------------------------------------------------- what goes wrong


def check_errors(v: Visitor) -> None:
    """Each status has its words; the question and its images come back, to be sent again."""
    expected = {
        "413": "more than the server accepts",
        "429": "busy. Try again in 7 s",
        "503": "takes no questions now. Try again in 7 s",
        "400": "The server said 400.",
        "500": "The server said 500.",
        "422": "The server said 422.",
    }
    v.ask("Hello?")
    for status, words in expected.items():
        v.attach(EXAMPLE)
        v.ask(f"status {status}")
        assert words in v.text("#notice"), v.text("#notice")
        assert v.page.input_value("#question") == f"status {status}" and len(v.answers()) == 1
        assert v.page.locator("#attached li").count() == 1
        v.page.locator("#attached button").click()
    v.ask("garbage")
    assert "not an answer" in v.text("#notice") and len(v.answers()) == 1
    v.server.model = "another"
    v.ask("Are you there?")
    assert "does not exist" in v.text("#notice")
    v.page.press("#question", "Enter")
    v.until("() => model === 'another' && turns.length === 2 && !running")
    assert len(sent(v)["messages"]) == 3 and not v.text("#notice") and v.text("#model") == "another"


def check_broken_streams(v: Visitor) -> None:
    """What came before an error stays, with the error below it; the limit of tokens is told as well."""
    notes = {
        "error": "The server reports: out of memory",
        "broken": "lost before the answer was complete",
        "short": "reached the limit of tokens",
        "nothing": "The answer is empty.",
    }
    for number, (question, note_) in enumerate(notes.items(), 1):
        v.ask(question)
        assert note_ in v.page.locator(".note").last.inner_text(), question
        assert len(v.answers()) == number and bool(v.answers()[-1]) == (question != "nothing")
    assert note_ in v.text("#status")
    v.ask("broken at once")
    assert "lost before" in v.text("#notice") and v.page.input_value("#question") == "broken at once"


def check_key(v: Visitor) -> None:
    """A server that asks for a key gets it as soon as it is entered."""
    v.server.key = "secret-1"
    v.page.reload()
    v.page.wait_for_selector("#notice span")
    assert "asks for an API key" in v.text("#notice")
    v.page.get_by_role("button", name="Enter key").click()
    assert v.js("() => document.activeElement.id") == "key"
    v.page.keyboard.type("wrong")
    v.page.keyboard.press("Enter")
    v.until("() => $('notice').textContent.includes('does not accept this API key')")
    v.page.fill("#key", "secret-1", force=True) if v.page.is_visible("#key") else v.page.click("#open-settings")
    v.page.fill("#key", "secret-1")
    v.page.keyboard.press("Enter")
    v.until("() => model !== null")
    assert not v.text("#notice") and v.text("#model") == page_server.MODEL
    v.ask("Hello?")
    assert len(v.answers()) == 1
    v.server.key = ""


def check_server_gone(v: Visitor) -> None:
    """A server that ends in the middle of an answer, and is gone afterwards."""
    with page_server.PageServer() as server:
        gone = Visitor(v.context.browser, server.url, server, v.folder)
        gone.ask_long("slow", 4)
        gone.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
        gone.page.keyboard.press("Escape")
        gone.wait()
        gone.ask("Hello?")
        assert "cannot be reached" in gone.text("#notice") and gone.page.input_value("#question") == "Hello?"
        gone.context.close()


# ---------------------------------------------------------------- text


def check_markdown(v: Visitor) -> None:
    """Headings, bold, code, and lists in lists."""
    v.ask("markdown")
    shape = v.js("""() => {
        const walk = (node) => [...node.children].map(shape).join(" ");
        const shape = (node) => node.localName + (node.children.length ? `(${walk(node)})` : "");
        return walk(document.querySelector(".text")); }""")
    assert shape == "h3 p(strong code) ol(li(strong) li(ul(li li)) li) p(code) pre(code) p", shape
    assert v.page.locator(".text ol > li >> nth=2").inner_text() == "a white square"


def check_hostile_text(v: Visitor) -> None:
    """HTML in answers, questions, model names and error messages is text."""
    v.ask("hostile")
    assert v.page.locator(".text").inner_text() == page_server.HOSTILE.replace("**", "")
    assert v.page.locator(".text strong").inner_text() == "<b>bold</b>"
    v.ask("status 400 <img src=x onerror=alert(1)>")
    v.ask("<script>alert(1)</script><img src=x>")
    assert v.page.locator("main img, main script, main a, #notice img").count() == 0


GROW = """(pieces) => {
    const grown = element("div"), once = element("div");
    pieces.forEach((_, i) => render(grown, pieces.slice(0, i + 1).join("")));
    render(once, pieces.join(""));
    return {
        same: grown.isEqualNode(once),
        tags: [...new Set([...once.querySelectorAll("*")].map((node) => node.localName))],
        words: (once.textContent.match(/word|語|🦙/gu) ?? []).length,
    }; }"""
TIME = """(text) => {
    const start = performance.now();
    render(element("div"), text);
    return (performance.now() - start) / 1000; }"""
TAGS = {"p", "ul", "ol", "li", "h3", "pre", "code", "strong"}
MARKS = (
    "`",
    "**",
    "*",
    "# ",
    "• ",
    "&",
    "<b>",
    "0) ",
    "10. ",
    "\t",
    "```\n",
    "~~~\n",
    "- ",
    "    ",
    "  - ",
    "\n",
    "\n\n",
)
HARD = ("`", "**", "- ", "  " * 500 + "- ", "* **", "\n", "1. a\n", "**`", "- a\n" + " " * 99 + "- b\n")


def check_any_text(v: Visitor) -> None:
    """Random text, shown as it grows, looks as if it had come at once, loses no word, and costs linear time."""
    rng = random.Random(0)
    for _ in range(400):
        pieces = [rng.choice([*MARKS, "word ", "語", "🦙", " "]) for _ in range(rng.randrange(60))]
        found = v.js(GROW, pieces)
        assert found["same"] and {*found["tags"]} <= TAGS, (pieces, found)
        assert found["words"] == len(re.findall("word|語|🦙", "".join(pieces))), (pieces, found)
    for text in HARD:
        assert (seconds := v.js(TIME, text * (200_000 // len(text)))) < 2, f"{text!r} takes {seconds:.1f} s"


EVENTS = (
    ': keep-alive\n\ndata: {"a": "語 🦙"}\r\n\r\nevent: x\ndata:{\ndata: "b": 1}\n\ndata: [DONE]\n\ndata: {"c": 2}\n\n'
)
READ = """async ([bytes, size]) => {
    const stream = new ReadableStream({start(controller) {
        for (let i = 0; i < bytes.length; i += size) controller.enqueue(new Uint8Array(bytes.slice(i, i + size)));
        controller.close();
    }});
    const found = [];
    for await (const event of readEvents(stream)) found.push(JSON.parse(event));
    return found; }"""


def check_any_chunks(v: Visitor) -> None:
    """Events are the same however the network splits them, also in the middle of a character."""
    for size in range(1, 24):
        found = v.js(READ, [list(EVENTS.encode()), size])
        assert found == [{"a": "語 🦙"}, {"b": 1}], (size, found)


SCRIPTED = (
    check_sent_images, check_errors, check_broken_streams, check_key, check_server_gone, check_markdown,
    check_hostile_text,
)  # fmt: skip
ANYWHERE = (check_attach, check_any_text, check_any_chunks)
