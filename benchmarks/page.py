"""Try the server's page, `infer/serve/page.html`, in a headless Chromium, as people with a mouse, a keyboard, a phone
or a screen reader use it.

    pip install playwright && playwright install chromium      # or Debian's: apt-get install chromium
    python benchmarks/page.py                                  # against a scripted server
    python benchmarks/page.py --url http://127.0.0.1:8000/     # against a real one: what needs no errors on demand
    python benchmarks/page.py --screenshots DIR                # saves what it looks like, light and dark
    python benchmarks/page.py --url ... --picture docs/page.png

Prints each check, then figures as JSON; exits with status 1 if a check fails.
"""

import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import page_checks  # noqa: E402
import page_contents  # noqa: E402
import page_inspection  # noqa: E402
from page_checks import EXAMPLE, Visitor  # noqa: E402
from page_server import PAGE, PageServer  # noqa: E402
from PIL import Image  # noqa: E402

from llava_jax.console import InputError, Parser, note, run_main  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "pip install playwright && playwright install chromium, or apt-get install chromium"
ANYWHERE = (*page_checks.ANYWHERE, *page_contents.ANYWHERE)
SCRIPTED = (*page_checks.SCRIPTED, *page_contents.SCRIPTED, *page_inspection.SCRIPTED)
PICTURED = (
    "Describe the image.",
    "Which colours do the circles have?",
    "Are there more circles than triangles? Explain.",
)
SIZES = {"desktop": (1280, 860), "phone": (360, 760)}


def open_browser(playwright):
    """Playwright's own Chromium if it is installed, or the system's.

    Raises:
      InputError: neither is there.
    """
    path = playwright.chromium.executable_path
    path = path if Path(path).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        raise InputError(f"no Chromium is installed: {INSTALL}")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's own refuses to run as root
    return playwright.chromium.launch(executable_path=path, args=sandbox)


def run_checks(browser, url: str | None, folder: Path, only: str) -> tuple[dict[str, float], list[str]]:
    """Seconds of each check that passed, and the names of those that did not. Prints both, with tracebacks."""
    passed, failed = {}, []
    for check in (*ANYWHERE, *(() if url else SCRIPTED)):
        name = check.__name__.removeprefix("check_").replace("_", " ")
        if only not in name:
            continue
        start = time.perf_counter()
        with PageServer() as server:
            visitor = Visitor(browser, url or server.url, None if url else server, folder)
            try:
                check(visitor)
                assert not visitor.problems, visitor.problems
            except Exception:
                failed.append(name)
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
            else:
                passed[name] = round(time.perf_counter() - start, 1)
                print(f"{name}: ok, {passed[name]} s", flush=True)
            visitor.context.close()
    return passed, failed


def measure(browser, folder: Path) -> dict[str, float]:
    """What the page costs: bytes, milliseconds until it is ready, and of the browser's main thread for a token."""
    with PageServer(delay=0.0) as server:
        v = Visitor(browser, server.url, server, folder)
        session = v.context.new_cdp_session(v.page)
        session.send("Performance.enable")

        def busy() -> float:
            return next(
                m["value"] for m in session.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration"
            )

        start = busy()
        v.ask("long")
        tokens = int(v.text(".stats").split()[0].replace(",", ""))
        figures = {
            "bytes": PAGE.stat().st_size,
            "ready_ms": round(v.js("() => performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"), 1),
            "ms_per_token": round((busy() - start) * 1000 / tokens, 2),
        }
        v.context.close()
    return figures


def take_screenshots(browser, url: str | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for device, (width, height) in SIZES.items():
            with PageServer() as server:
                v = Visitor(
                    browser, url or server.url, None if url else server, folder,
                    color_scheme=scheme, viewport={"width": width, "height": height}, device_scale_factor=2,
                )  # fmt: skip

                def shot(name: str, v=v, prefix=f"{scheme}-{device}") -> None:
                    v.page.wait_for_timeout(150)
                    v.page.screenshot(path=folder / f"{prefix}-{name}.png")

                shot("1-empty")
                v.attach(EXAMPLE)
                v.ask("What is in this image?")
                v.ask("Which shapes are white?")
                shot("2-chat")
                v.attach(
                    v.image("wide.png", (3000, 300)),
                    v.image("tall.png", (300, 3000)),
                    v.image("photo.jpg", (1600, 1200)),
                )
                shot("3-attached")
                v.ask("markdown")
                shot("4-markdown")
                v.ask_long("slow: and the rest?", 300)
                shot("5-streaming")
                v.page.keyboard.press("Escape")
                v.wait()
                if not url:
                    v.ask("status 429")
                    shot("6-busy")
                v.page.click("#open-settings")
                shot("7-settings")
                v.context.close()


def take_picture(browser, url: str | None, file: Path) -> None:
    """A conversation about the example image, in few colours: for the README."""
    with PageServer() as server, tempfile.TemporaryDirectory() as folder:
        v = Visitor(
            browser, url or server.url, None if url else server, Path(folder),
            color_scheme="light", viewport={"width": 900, "height": 890}, device_scale_factor=2,
        )  # fmt: skip
        v.attach(EXAMPLE)
        for question in PICTURED:
            v.ask(question)
        v.js("() => scrollTo(0, 0)")
        v.page.wait_for_timeout(300)
        image = Image.open(io.BytesIO(v.page.screenshot())).convert("RGB")
        image.quantize(255, kmeans=2, dither=Image.Dither.NONE).save(file, optimize=True)
        v.context.close()


def main() -> int:
    p = Parser("python benchmarks/page.py", description="Try the server's page in a headless Chromium.")
    p.add_argument("--url", help="the page of a running server (default: a scripted server)")
    p.add_argument("--only", default="", metavar="WORDS", help="the checks with these words in their name")
    p.add_argument("--screenshots", type=Path, metavar="DIR")
    p.add_argument("--picture", type=Path, metavar="FILE", help="one picture of a conversation, and no checks")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = p.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise InputError(f"playwright is not installed: {INSTALL}") from error
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = open_browser(playwright)
        note(f"Chromium {browser.version}")
        if args.picture:
            take_picture(browser, args.url, args.picture)
            return 0
        passed, failed = run_checks(browser, args.url, Path(folder), args.only)
        if not passed and not failed:
            raise InputError(f"--only {args.only!r}: no check has these words in its name")
        figures = {"passed": len(passed), "failed": failed, "seconds": passed}
        if not args.only:
            figures |= measure(browser, Path(folder))
        if args.screenshots:
            take_screenshots(browser, args.url, args.screenshots)
        browser.close()
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return bool(failed)


if __name__ == "__main__":
    run_main(main)
