"""What `benchmarks/page.py` checks of conversations. Each check is a function of a visitor with a new tab; those in
`SCRIPTED` need the scripted server.
"""

import json
import re
import time
from pathlib import Path

import numpy as np
import page_server
from page_server import images_of, text_of
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "infer" / "shapes" / "example.png"


def wait_for(condition, what: str, seconds: float = 60):
    """The condition's value, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


class Visitor:
    """A person with a tab open on the page.

    Attributes:
      page: the tab. problems: errors of its console: exceptions, violations of the content security policy.
      server: the scripted server; None if it is a real one.
    """

    def __init__(self, browser, url: str, server, folder: Path, **context):
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **context)
        self.page, self.server, self.url, self.folder = self.context.new_page(), server, url, folder
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self._log(line))
        self.page.goto(url)
        self.until("() => model !== null || document.querySelector('#notice span')")

    def _log(self, line) -> None:
        if line.type == "error" and "Failed to load resource" not in line.text:
            self.problems.append(line.text)

    def js(self, function: str, argument=None):
        return self.page.evaluate(function, argument)

    def until(self, function: str, argument=None) -> None:
        """Until a function of the page is true. (The page's policy forbids Playwright's own `wait_for_function`.)"""
        wait_for(lambda: self.js(function, argument), function)

    def ask(self, question: str, *, wait: bool = True) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        if wait:
            self.wait()

    def ask_long(self, question: str, characters: int) -> None:
        """Ask what has a long answer, and wait until that much of it is there. A real model is kept from ending it."""

        def lengthen(route) -> None:
            route.continue_(
                post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True, "max_tokens": 500})
            )

        if not self.server:
            self.page.route("**/v1/chat/completions", lengthen, times=1)
        self.ask(question, wait=False)
        self.until(
            "n => (document.querySelector('.answer:last-child .text')?.textContent.length ?? 0) >= n", characters
        )

    def wait(self) -> None:
        """Until the answer is complete, or the question is back."""
        self.until("() => !running && !document.querySelector('#send').matches('.busy')")

    def answers(self) -> list[str]:
        return self.page.locator(".answer .text").all_inner_texts()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def attach(self, *paths: Path) -> None:
        count = self.page.locator("#attached li").count() + len(paths)
        self.page.set_input_files("#files", [str(path) for path in paths])
        self.until("n => document.querySelectorAll('#attached li').length === n", count)

    def image(self, name: str, size: tuple[int, int], **save) -> Path:
        """A file with an image: red grows to the right, green to the bottom."""
        width, height = size
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
        path = self.folder / name
        Image.fromarray(pixels).save(path, **save)
        return path


def sent(v: Visitor) -> dict:
    """The last request."""
    return v.server.requests[-1]


# ---------------------------------------------------------------- conversations


def check_streams(v: Visitor) -> None:
    """The answer appears token by token, is announced once, at its end, and the figures are below it."""
    heard = v.js("""() => { window.heard = []; window.lengths = new Set();
        new MutationObserver(() => heard.push($("status").textContent)).observe($("status"), {childList: true});
        new MutationObserver(() => lengths.add($("conversation").textContent.length))
            .observe($("conversation"), {childList: true, subtree: true, characterData: true}); }""")
    v.attach(EXAMPLE)
    v.ask("Describe the image.")
    heard, lengths = v.js("() => [heard, lengths.size]")
    assert v.answers()[0], "no answer"
    assert lengths >= 4, f"the answer came in {lengths} steps"
    assert heard[0] == "Answering." and len(heard) == 2, heard
    assert "".join(heard[1].split()).startswith("".join(v.answers()[0].split())[:20]), heard
    assert re.match(r"\d+ tokens?( · [\d.,]+ tokens/s)? · first after [\d.,]+ s", v.text(".stats")), v.text(".stats")
    assert v.js("() => document.activeElement.id") == "question"


def check_turns(v: Visitor) -> None:
    """Several questions, with several images in any of them; the server is sent all of them."""
    v.attach(EXAMPLE)
    v.ask("What is in this image?")
    v.ask("Which shapes are white?")
    v.attach(EXAMPLE, v.image("wide.png", (300, 20)))
    v.ask("And in these?")
    answers = v.answers()
    assert len(answers) == 3 and all(answers)
    assert v.page.locator(".question img").count() == 3
    assert [image.get_attribute("alt") for image in v.page.locator(".question img").all()] == [
        "example.png", "example.png", "wide.png",
    ]  # fmt: skip
    if v.server:
        messages, example = sent(v)["messages"], Image.open(EXAMPLE).size
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert [[i.size for i in images_of(m)] for m in messages[::2]] == [[example], [], [example, (300, 20)]]
        assert text_of(messages[2]) == "Which shapes are white?"
        assert messages[1]["content"].startswith("The image shows five shapes")
        assert "522 of 581 prompt tokens cached" in v.text(".answer >> nth=0"), v.text(".answer >> nth=0")
        with Image.open(EXAMPLE) as image:  # what is sent is what was dropped, pixel by pixel
            assert np.array_equal(
                np.asarray(image.convert("RGB")), np.asarray(images_of(messages[0])[0].convert("RGB"))
            )


def check_stop(v: Visitor) -> None:
    """Escape, or the button, stops the answer; what there is stays, and belongs to the conversation."""
    for number, stop in enumerate((lambda: v.page.keyboard.press("Escape"), lambda: v.page.click("#send")), 1):
        v.ask_long("slow: describe the image at length.", 8)
        assert v.page.locator("#send").get_attribute("aria-label") == "Stop"
        v.page.fill("#question", "the next one")
        v.page.keyboard.press("Enter")  # not while an answer is written
        stop()
        v.wait()
        assert v.page.locator("#send").get_attribute("aria-label") == "Send"
        assert v.page.locator(".note").all_inner_texts() == ["Stopped."] * number
        assert v.page.input_value("#question") == "the next one"
        if v.server:
            wait_for(lambda n=number: v.server.cancelled == n, "the server to see that the client left", 5)
    if v.server:
        v.ask("Go on.")
        assert [m["role"] for m in sent(v)["messages"]] == ["user", "assistant"] * 2 + ["user"]
        assert sent(v)["messages"][1]["content"].startswith("word")


def check_new_chat(v: Visitor) -> None:
    """A new chat is empty, also before and in the middle of an answer, which then stops."""
    for question, characters in (("late: describe the image.", 0), ("slow: describe the image at length.", 8)):
        v.attach(EXAMPLE)
        v.ask_long(question, characters)
        v.page.click("#new")
        v.page.wait_for_timeout(200)  # for what the old answer might still do
        assert not v.answers() and v.page.is_visible("#welcome") and not v.text("#notice")
        assert v.page.input_value("#question") == "" and not v.page.locator("#attached li").count()
        assert v.page.locator("#send").get_attribute("aria-label") == "Send"
    v.ask("What is in this image?")
    assert len(v.answers()) == 1
    if v.server:
        assert len(sent(v)["messages"]) == 1


def check_regenerate(v: Visitor) -> None:
    """The last answer is replaced; if no other comes, it stays."""
    v.ask("Hello?")
    v.ask("Are you there?")
    before = v.answers()
    assert v.page.get_by_role("button", name="Regenerate").count() == 1
    v.page.get_by_role("button", name="Regenerate").click()
    v.wait()
    assert len(v.answers()) == 2 and v.answers()[0] == before[0]
    if v.server:
        assert v.answers()[1] != before[1] and len(sent(v)["messages"]) == 3
        before, v.server.key = v.answers(), "needed"
        v.page.get_by_role("button", name="Regenerate").click()
        v.wait()
        v.server.key = ""
        assert v.answers() == before and "API key" in v.text("#notice")
        assert v.page.get_by_role("button", name="Regenerate").count() == 1


def check_copy(v: Visitor) -> None:
    """The Markdown itself is copied, also where browsers have no clipboard API."""
    v.ask("markdown")
    copied = v.page.get_by_role("button", name=re.compile("^Cop(y|ied)$"))
    for hidden in (False, True):
        v.js("() => navigator.clipboard.writeText('nothing')")
        v.js("hidden => hidden && (navigator.clipboard.writeText = () => Promise.reject())", hidden)
        copied.click()
        v.until("() => document.querySelector('.tools button').textContent === 'Copied'")
        text = v.js("() => navigator.clipboard.readText()")
        assert text.strip() == v.js("() => turns[0].answer.text").strip() and text != "nothing", text
        v.until("() => document.querySelector('.tools button').textContent === 'Copy'")


def check_examples(v: Visitor) -> None:
    """The three example questions fill the field."""
    for button in v.page.locator("#examples button").all():
        button.click()
        assert v.page.input_value("#question") == button.inner_text()
    assert v.page.locator("#examples button").count() == 3
    assert v.js("() => document.activeElement.id") == "question"


def check_settings(v: Visitor) -> None:
    """They are sent, and stay, except for the key, which the tab alone keeps. What is invalid is not sent."""
    values = {
        "system": "Be brief.",
        "temperature": "0.7",
        "top_p": "0.9",
        "max_tokens": "40",
        "seed": "7",
        "key": "k-1",
    }
    v.page.click("#open-settings")
    for name, value in values.items():
        v.page.fill(f"#{name}", value)
    v.page.get_by_role("button", name="Done").click()
    assert v.js("() => document.activeElement.id") == "open-settings"
    v.page.reload()
    assert {name: v.page.input_value(f"#{name}") for name in values} == values
    assert v.js("() => [Object.keys(localStorage).includes('llava-key'), sessionStorage['llava-key']]") == [
        False,
        "k-1",
    ]
    v.ask("Hello?")
    body = sent(v)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == page_server.MODEL
    assert [body[k] for k in ("temperature", "top_p", "max_tokens", "seed")] == [0.7, 0.9, 40, 7]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["headers"]["Authorization"] == "Bearer k-1"
    v.page.click("#open-settings")
    v.page.fill("#temperature", "9")
    v.page.fill("#top_p", "")
    v.page.get_by_role("button", name="Done").click()
    assert v.page.locator("#settings").get_attribute("open") is not None, "closed with an invalid temperature"
    v.page.keyboard.press("Escape")
    v.ask("Hello?")
    assert "temperature" not in sent(v) and "top_p" not in sent(v)
    v.page.click("#open-settings")
    v.page.get_by_role("button", name="Restore defaults").click()
    assert [v.page.input_value(f"#{name}") for name in values] == ["", "0", "", "", "", "k-1"]


SCRIPTED = (check_settings, check_copy)
ANYWHERE = (check_streams, check_turns, check_stop, check_new_chat, check_regenerate, check_examples)
