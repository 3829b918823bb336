"""Images from URLs: downloads from servers of every kind, `data:` and `file:`."""

import base64
import collections
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote, unquote

import numpy as np
import pytest

from helpers import image_file
from llava_jax.console import InputError
from llava_jax.data import urls
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import image_size, open_image


@pytest.fixture
def server(scene):
    png, asked = image_file(scene, "PNG"), collections.Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.partition("?")[0].removeprefix("/")
            getattr(self, name, self.missing)()

        def answer(self, code=200, body=b"", **headers):
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def missing(self):
            self.answer(404, b"no")

        def image(self):
            self.answer(body=png)

        def drip(self):
            self.answer()
            self.slowly(self.wfile)

        def drip_headers(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
            self.slowly(self.wfile)

        def slowly(self, file):
            try:
                for _ in range(100):
                    file.write(b"x")
                    time.sleep(0.05)
            except OSError:  # nobody listens any more
                pass

        def large(self):
            self.answer(body=b"x", Content_Length=10**12)

        def endless(self):
            self.answer(body=b"x" * 10_000)

        def short(self):
            self.answer(body=png[:50], Content_Length=len(png))

        def busy(self):
            """The answers, or hang-ups, of the query, one each time; then the image."""
            query = unquote(self.path.partition("?")[2])
            fates, asked[query] = query.split("&"), asked[query] + 1
            if asked[query] > len(fates):
                return self.image()
            fate, _, seconds = fates[asked[query] - 1].partition("=")
            if fate == "short":
                return self.short()
            if fate.isdigit():
                return self.answer(int(fate), b"busy", **({"Retry_After": seconds} if seconds else {}))
            linger = struct.pack("ii", 1, 0)  # closing is a reset then
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

        def to(self):
            self.answer(302, b"x" * 10_000, Location=self.path.partition("?")[2])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_urls(server, scene):
    for path in ("image", "to?/image", f"to?{server}/to?image"):
        np.testing.assert_array_equal(open_image(f"{server}/{path}"), scene)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere", "the server returned 404"),
        ("drip", "too slow"),
        ("drip_headers", "0 bytes in 0 seconds: too slow"),
        ("large", "larger than 0 MiB"),
        ("endless", "larger than 0 MiB"),
        ("short", "bytes short"),
        ("to?ftp://127.0.0.1:1/a.png", "redirects to ftp://127.0.0.1:1/a.png; only http: and https: are supported"),
        ("to?file:///etc/hostname", "redirects to file:///etc/hostname; only"),
        ("to?data:image/png,x", "redirects to data:image/png,x; only"),
        ("to?to", "the server returned 302"),
        ("to?" + "/to?" * 20, "redirects more than 5 times"),
    ],
)
def test_servers_that_nobody_can_wait_for(server, monkeypatch, path, says):
    monkeypatch.setattr(urls, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(urls, "WAITS", ())
    monkeypatch.setattr(urls, "MAX_DOWNLOAD", 5000)
    with pytest.raises(InputError, match=says) as error:
        open_image(f"{server}/{path}")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("fates", ["503", "429=1&502", "reset", "reset&short&504"])
def test_what_may_pass_is_tried_again(server, scene, monkeypatch, fates):
    waited = []
    monkeypatch.setattr(urls, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waited.append))
    np.testing.assert_array_equal(open_image(f"{server}/busy?{fates}"), scene)
    assert waited == {"429=1&502": [1.0, 1.0]}.get(fates, [0.5, 1.0, 2.0][: 1 + fates.count("&")])


@pytest.mark.parametrize(
    ("fates", "times", "says"),
    [
        ("503&503&503&503&503", 3, "the server returned 503"),
        ("404&404", 0, "the server returned 404"),
        ("503=10&503=11", 1, "the server returned 503"),  # 11 seconds are more than a command waits
        ("429=" + "9" * 400, 0, "the server returned 429"),
        ("503=Fri, 31 Dec 1999 23:59:59 GMT&404", 1, "the server returned 404"),
    ],
)
def test_what_does_not_pass_is_given_up(server, monkeypatch, capsys, fates, times, says):
    waited = []
    monkeypatch.setattr(urls, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waited.append))
    with pytest.raises(InputError, match=says):
        open_image(f"{server}/busy?{quote(fates, safe='&=')}")
    assert len(waited) == times
    assert ("trying again in 10 seconds" in capsys.readouterr().err) == (10.0 in waited)


@pytest.mark.parametrize("url", ["http://h:1/a b.png", "http://[::1", "http://127.0.0.1:1/x.png"])
def test_urls_that_are_none(url):
    with pytest.raises(InputError, match="cannot be fetched"):
        open_image(url)


def test_url_that_nobody_answers():
    with pytest.raises(InputError, match="cannot be fetched"):
        open_image("http://127.0.0.1:9/a.png")


# ---------------------------------------------------------------- data: and file: URLs


def test_data_urls(scene):
    png = image_file(scene, "PNG")
    text = base64.b64encode(png).decode()
    for url in (
        f"data:image/png;base64,{text}",
        f"data:image/jpeg;name=a.png;base64,{text}",  # what kind it is, its bytes say
        f"data:;base64,{text}",
        f"DATA:IMAGE/PNG;BASE64,{text}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png).decode()}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png;base64, {text[:60]}\r\n{text[60:]}\n",
        f"data:image/png,{quote(png)}",
        f"data:,{quote(png)}",
    ):
        np.testing.assert_array_equal(open_image(url), scene)
        assert image_size(url) == scene.size


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "without a comma"), ("data:", "without a comma"), ("data:,", "without data"),
        ("data:image/png;base64,", "without data"), ("data:image/png;base64,%%%", "invalid base64"),
        ("data:image/png;base64,a", "invalid base64"), ("data:image/png;base64,aGk=aGk=", "invalid base64"),
        ("data:image/png;base64,\ud800", "invalid base64"), ("data:text/html;base64,aGk=", "of text/html, not of"),
        ("data:image/png;base64,aGk=", "not an image"), ("data:image/png,hello", "not an image"),
        ("data:application/pdf,hello", "of application/pdf, not of an image"),
        ("file://", "without a file"), ("file:///", "without a file"), ("file://localhost", "without a file"),
        ("file://host/a.png", "a file on host host; only local files"),
        ("file:///no/such.png", "/no/such.png: no such image"), ("file:/no/such.png", "/no/such.png: no such image"),
        ("file:///a%00.png", "cannot be read"),
    ],
)  # fmt: skip
def test_urls_that_hold_no_image(url, says):
    with pytest.raises(InputError, match=says):
        open_image(url)


def test_file_urls(scene, tmp_path):
    for name in ("a.png", "a b#1?.png", "100%.png", "\u00e4.png"):
        (tmp_path / name).write_bytes(image_file(scene, "PNG"))
        for start in ("file://", "file://localhost", "FILE://LocalHost", "file:"):
            np.testing.assert_array_equal(open_image(f"{start}{quote(str(tmp_path / name))}"), scene)
    np.testing.assert_array_equal(open_image(f"file://{tmp_path}/a b#1?.png"), scene)  # as many write it


@pytest.mark.parametrize(
    "source",
    [
        "a" * 9999, "/" + "a/" * 4000, "x y " * 2000, "data:image/png;base64," + "A" * 9999, "data:" + "a" * 9999,
        "data:text/" + "a" * 9999 + ",b", "data:image/png;base64," + "?" * 9999, "http://h:1/" + "a b" * 3000,
        "http://[" + "a" * 9999, "file:///" + "a" * 9999, "file://" + "a" * 9999 + "/b", "http://x:1/" + "a" * 9999,
    ],
)  # fmt: skip
def test_no_error_repeats_a_long_name(source, tmp_path):
    for ask in (open_image, image_size, ImageFolder(tmp_path).find):
        try:
            ask(source)
        except InputError as error:
            assert len(str(error)) < 300
            assert not any(source[i : i + 101] in str(error) for i in range(0, len(source) - 100, 50))
        else:
            assert ask not in (open_image, image_size)
