"""What `benchmarks/page.py` checks of the page for people who see little or nothing, use a keyboard, or have a small or
a very wide screen: WCAG 2.2's criteria, measured in the browser.
"""

import itertools

from page_checks import EXAMPLE, Visitor

# The contrast of each text with what is behind it, and of each border and focus ring that tells where a control is.
CONTRAST = """() => {
    const context = element("canvas", {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
    const rgba = (color) => { context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
    const over = (top, below) => top.map((x, i) => i < 3 ? x * top[3] + below[i] * (1 - top[3]) : 1);
    const behind = (node) => { const own = node ? rgba(getComputedStyle(node).backgroundColor) : [255, 255, 255, 1];
        return own[3] === 1 ? own : over(own, behind(node.parentElement)); };
    const light = (color) => color.slice(0, 3).map((x) => x / 255)
        .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = (color, node) => { const below = behind(node), a = light(over(rgba(color), below)), b = light(below);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
    const found = [];
    const add = (kind, text, color, node) => found.push([kind, text, ratio(color, node)]);
    const scope = $("settings").open ? $("settings") : document.body;
    const walker = document.createTreeWalker(scope, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        const text = walker.currentNode.data.trim().slice(0, 40);
        if (!text || !node.checkVisibility() || node.closest(".unseen, #drop, script")) continue;
        add("text", text, getComputedStyle(node).color, node);
    }
    for (const node of scope.querySelectorAll("input, textarea")) {
        if (!node.checkVisibility()) continue;
        add("text", node.placeholder, getComputedStyle(node, "::placeholder").color, node);
        add("text", node.id, getComputedStyle(node).color, node);
        const box = node.closest("#composer") ?? node;
        add("border", node.id, getComputedStyle(box).borderColor, box.parentElement);
    }
    for (const node of scope.querySelectorAll("svg")) {
        if (node.checkVisibility() && !node.matches(".mark")) add("icon", "", getComputedStyle(node).color, node);
    }
    return found; }"""

FOCUSED = """() => {
    const node = document.activeElement;
    if (node === document.body) return null;
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    const composer = getComputedStyle($("composer"));
    const seen = document.elementFromPoint(box.x + box.width / 2, box.y + Math.min(box.height / 2, 20));
    return {
        name: node.id || node.ariaLabel || node.textContent.trim(),
        ring: (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2) ||
            (node.id === "question" && composer.boxShadow.includes("3px")),
        visible: box.top >= 0 && box.bottom <= innerHeight + 1 && node.contains(seen),
    }; }"""

NAMED = {"button", "textbox", "spinbutton", "image", "dialog", "form", "group", "link", "heading"}


def accessibility_tree(v: Visitor) -> list[tuple[str, str]]:
    """Role and name of what a screen reader finds, as Chromium computes them."""
    session = v.context.new_cdp_session(v.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]


def converse(v: Visitor) -> None:
    """Two turns, with images, code, a note and an error."""
    v.attach(EXAMPLE, v.image("wide.png", (900, 60)))
    v.ask("markdown")
    v.ask("short")
    v.attach(EXAMPLE)
    if v.server:
        v.ask("status 429")


HEADINGS = """() => [...document.querySelectorAll("h1, h2, h3, h4")]
    .filter((node) => node.checkVisibility()).map((node) => Number(node.localName[1]))"""


def check_names(v: Visitor) -> None:
    """What can be used has a name; landmarks and headings are there, and in order."""
    converse(v)
    tree = accessibility_tree(v)
    assert not (nameless := [role for role, name in tree if role in NAMED and not name]), nameless
    assert {"banner", "main", "form", "alert", "status"} <= {role for role, _ in tree}
    levels = v.js(HEADINGS)
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    assert ("image", "example.png") in tree and ("button", "Remove example.png") in tree
    v.page.click("#open-settings")
    tree = accessibility_tree(v)
    assert ("dialog", "Settings") in tree
    fields = [name for role, name in tree if role in ("textbox", "spinbutton")]
    assert len(fields) == 6 and all(fields), fields


def check_contrast(v: Visitor) -> None:
    """At least 4.5 for text, 3 for icons and borders, light and dark."""
    states = {
        "empty": lambda: v.page.reload(),
        "chat": lambda: converse(v),
        "settings": lambda: v.page.click("#open-settings"),
    }
    for scheme in ("light", "dark"):
        v.page.emulate_media(color_scheme=scheme)
        for state, enter in states.items():
            enter()
            found = v.js(CONTRAST)
            assert len(found) > 12, found
            low = [item for item in found if item[2] < (4.5 if item[0] == "text" else 3)]
            assert not low, f"{scheme}, {state}: {low}"


def check_tab_order(v: Visitor) -> None:
    """Tab reaches everything in order, with a visible ring, and leaves again."""
    converse(v)
    v.page.click("h1")  # from where Tab starts
    order = []
    while True:
        v.page.keyboard.press("Tab")
        focused = v.js(FOCUSED)
        if focused is None:
            break
        assert focused["ring"] and focused["visible"], focused
        order.append(focused["name"])
        assert len(order) < 40, f"no way out: {order}"
    assert order == [
        "new", "open-settings", "Code", "Copy", "Copy", "Regenerate", "Dismiss", "Remove example.png",
        "choose", "question", "send",
    ], order  # fmt: skip


def check_keys(v: Visitor) -> None:
    """Shift and Enter is a new line; the dialog keeps the focus until Escape, which gives it back."""
    v.page.fill("#question", "one")
    v.page.keyboard.press("Shift+Enter")
    v.page.keyboard.type("two")
    assert v.page.input_value("#question") == "one\ntwo" and not v.answers()
    assert v.js("() => $('question').clientHeight >= $('question').scrollHeight"), "the field does not grow"
    v.page.keyboard.press("Enter")
    v.wait()
    assert v.text(".question p") == "one\ntwo"
    v.page.focus("#open-settings")
    v.page.keyboard.press("Enter")
    for _ in range(12):
        assert v.js("() => document.activeElement.matches('body, #settings *')"), "the focus leaves the dialog"
        v.page.keyboard.press("Tab")
    v.page.keyboard.press("Escape")
    assert v.js("() => document.activeElement.id") == "open-settings"


FITS = """() => {
    const settings = $("settings").getBoundingClientRect(), rem = parseFloat(getComputedStyle(document.body).fontSize);
    const sides = (node) => { const box = node.getBoundingClientRect(); return Math.min(box.width, box.height); };
    return {
        overflow: document.documentElement.scrollWidth - innerWidth,
        small: [...document.querySelectorAll("button")].filter((b) => b.checkVisibility() && sides(b) < 24).length,
        em: $("conversation").clientWidth / rem,
        settings: settings.x >= 0 && settings.right <= innerWidth && settings.bottom <= innerHeight &&
            $("settings").scrollWidth <= $("settings").clientWidth,
    }; }"""
SCREENS = ((320, 568, 100), (360, 760, 100), (640, 800, 200), (768, 1024, 100), (1280, 860, 100), (2560, 1440, 100))


def check_sizes(v: Visitor) -> None:
    """Nothing is too wide or too small to touch, from 320 pixels to a wide screen, and with letters twice as large."""
    converse(v)
    v.ask("w" * 300)
    for width, height, percent in SCREENS:
        v.page.set_viewport_size({"width": width, "height": height})
        v.js("percent => { document.documentElement.style.fontSize = `${percent}%`; }", percent)
        v.page.click("#open-settings")
        found = v.js(FITS)
        assert found["overflow"] <= 0 and not found["small"] and found["em"] < 50 and found["settings"], (width, found)
        v.page.keyboard.press("Escape")


def check_motion(v: Visitor) -> None:
    """Nothing moves for those who ask for that."""
    for motion, animated in (("no-preference", True), ("reduce", False)):
        v.page.emulate_media(reduced_motion=motion)
        v.ask_long("slow: describe the image.", 8)
        assert v.js("() => document.getAnimations().length > 0") == animated, motion
        v.page.keyboard.press("Escape")
        v.wait()


def check_scrolling(v: Visitor) -> None:
    """The page follows an answer, unless its reader has scrolled up."""
    v.page.set_viewport_size({"width": 700, "height": 360})
    end = "() => document.documentElement.scrollHeight - innerHeight - scrollY"
    v.ask_long("slow: describe the image at great length.", 800)
    assert v.js(end) < 60, v.js(end)
    v.js("() => scrollTo(0, 0)")
    v.until("() => $('conversation').textContent.length > 1000")
    assert v.js("() => scrollY") == 0
    v.page.keyboard.press("Escape")
    v.wait()
    assert v.js("() => scrollY") == 0


SCRIPTED = (
    check_names, check_contrast, check_tab_order, check_keys, check_sizes, check_motion, check_scrolling,
)  # fmt: skip
