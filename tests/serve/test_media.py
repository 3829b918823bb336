"""Images that clients name by URL: what is downloaded, and what no client can reach."""

import contextlib
import http.server
import io
import ipaddress
import socket
import threading
import time

import httpx
import pytest
from PIL import Image

from infer.serve import media
from infer.serve.media import NotFetched, Refused, fetch_image, is_public, media_guard, parse_domain
from llava_jax.console import InputError
from scripted_server import Server


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.192 0.0.0.0 224.0.0.1 239.1.1.1 "
    "240.0.0.1 255.255.255.255 198.18.0.1 192.0.2.1 ::1 :: fe80::1 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 "
    "::ffff:10.0.0.1 ::127.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1 2001:db8::1 2001:0:7f00:1::".split(),
)
def test_addresses_of_no_host_of_the_internet(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", "8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8".split())
def test_addresses_of_the_internet(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("text", ["", "http://a.com", "a.com/", "*", "*.", "a b", "a.com:80", "*.*.com", "user@a.com"])
def test_what_is_not_a_domain(text):
    with pytest.raises(InputError, match="must be a host name"):
        parse_domain(text)


class Images(http.server.BaseHTTPRequestHandler):
    """Serves an image, redirects, and misbehaves."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b"\0" * 3000)
                    time.sleep(0.05)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "PNG")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def images():
    """A web server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def internet(monkeypatch):
    """What `names` resolve to, one answer after the other; 127.0.0.1 counts as an address of the internet, 127.0.0.2
    does not."""
    names: dict[str, list[str]] = {}
    asked: list[str] = []

    def getaddrinfo(host, port, **_):
        asked.append(host)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses.split()]

    resolver = type("socket", (), {**vars(socket), "getaddrinfo": staticmethod(getaddrinfo)})
    monkeypatch.setattr(media, "socket", resolver)
    monkeypatch.setattr(media, "is_public", lambda address: str(address) == "127.0.0.1")
    return names


def fetch(url, *domains, max_bytes=2**20, seconds=5.0):
    return fetch_image(url, "image 1", media_guard(domains or ("good.example",), max_bytes, seconds))


def test_downloads(images, internet):
    internet |= {"good.example": ["127.0.0.1"], "a.b.example": ["127.0.0.1"]}
    port = images.server_port
    data = fetch(f"http://good.example:{port}/a.png")
    assert data[:4] == b"\x89PNG" and data.name == "image 1"
    assert fetch(f"HTTP://Good.Example.:{port}/to//b.png") == data  # redirected to itself
    assert fetch(f"http://a.b.example:{port}/a.png", "*.b.example") == data


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example:PORT/", "http://notgood.example:PORT/", "http://good.example.evil.example:PORT/",
        "http://127.0.0.1:PORT/", "http://good.example:PORT/to/http://evil.example:PORT/a.png",
        "http://good.example:PORT/to/http://127.0.0.1:PORT/a.png", "http://good.example:PORT/to//to/http://localhost:PORT/",
    ],
)  # fmt: skip
def test_hosts_that_are_not_allowed(images, internet, url):
    for name in ("good.example", "evil.example", "notgood.example", "good.example.evil.example", "localhost"):
        internet[name] = ["127.0.0.1"]
    images.asked.clear()
    with pytest.raises(Refused, match="not allowed here"):
        fetch(url.replace("PORT", str(images.server_port)))
    assert all(path.startswith("/to/") for path in images.asked)


def test_hosts_with_private_addresses(images, internet):
    images.asked.clear()
    for answer in ("127.0.0.2", "127.0.0.1 127.0.0.2"):
        internet["good.example"] = [answer]
        with pytest.raises(Refused, match="not a host of the internet"):
            fetch(f"http://good.example:{images.server_port}/")
    assert not images.asked


def test_an_allowed_address():
    with pytest.raises(Refused, match="not a host of the internet"):  # it is allowed, but private
        fetch("http://[::1]/", parse_domain("[0:0::1]"))
    with pytest.raises(Refused, match="not allowed here"):
        fetch("http://[::2]/", parse_domain("[::1]"))


def test_the_address_that_was_checked_is_the_one_that_is_asked(images, internet):
    internet["good.example"] = ["127.0.0.1", "127.0.0.2"]  # a second resolution would get the private one
    assert fetch(f"http://good.example:{images.server_port}/a.png")[:4] == b"\x89PNG"
    with pytest.raises(Refused):  # a redirect resolves again
        fetch(f"http://good.example:{images.server_port}/to//a.png")


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://good.example/", "data:image/png;base64,AAAA", "gopher://x/"]
)
def test_redirects_to_other_schemes(images, internet, to):
    internet["good.example"] = ["127.0.0.1"]
    with pytest.raises(NotFetched, match="redirects to"):
        fetch(f"http://good.example:{images.server_port}/to/{to}")


def test_limits_on_bytes_and_time(images, internet, capfd):
    internet["good.example"] = ["127.0.0.1"]
    with pytest.raises(NotFetched, match="larger than 1 MiB"):
        fetch(f"http://good.example:{images.server_port}/endless")
    start = time.monotonic()
    with pytest.raises(NotFetched, match="too slow"):
        fetch(f"http://good.example:{images.server_port}/slow", seconds=0.3)
    assert time.monotonic() - start < 2
    with pytest.raises(NotFetched, match="returned 404"):
        fetch(f"http://good.example:{images.server_port}/missing")
    with pytest.raises(NotFetched, match="cannot be fetched"):
        fetch("http://unknown.example/", "unknown.example")
    assert not capfd.readouterr().err  # what clients ask for is not logged


@pytest.mark.parametrize(
    "url",
    [
        "http://user@good.example/", "http://good.example\\@evil.example/", "http://good.example/ x", "https://",
        "http://good.example/\r\nHost: evil", "http:///a.png", "http://göod.example/", "http://good.example:99999999/",
    ],
)  # fmt: skip
def test_what_is_not_a_url(internet, url):
    with pytest.raises(InputError, match="is not a URL|is not a data: URL"):
        fetch(url)


def test_statuses(images, internet):
    internet["good.example"] = ["127.0.0.1"]

    def ask(url):
        content = [{"type": "image_url", "image_url": url.replace("PORT", str(images.server_port))}]
        body = {"messages": [{"role": "user", "content": content}]}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        return response.status_code, response.json().get("error", {}).get("message")

    with Server(media_domains=("good.example",)) as server:
        assert ask("http://good.example:PORT/a.png")[0] == 200
        status, message = ask("http://good.example:PORT/missing")
        assert status == 422 and message.startswith("messages[0].content[0]: ")
        assert ask("http://evil.example:PORT/a.png")[0] == 400
        assert ask("file:///etc/passwd")[0] == 400


def parts(*urls):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url} for url in urls]}]}


PIXELS = "data:image/gif;base64,R0lGODlhBAAEAIAAAP///wAAACwAAAAABAAEAAACBISPCQUAOw=="


def test_downloads_count_as_bytes_of_requests(images, internet, monkeypatch):
    monkeypatch.setattr("infer.serve.settings.Settings.max_bodies", 400)
    internet["good.example"] = ["127.0.0.1"]
    url = f"http://good.example:{images.server_port}/a.png"  # 75 bytes
    with Server(media_domains=("good.example",)) as server:
        for count, status in ((1, 200), (4, 429), (1, 200)):
            body = parts(*[url] * count)
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
            assert reply.status_code == status, (count, len(reply.request.content), reply.text)
        assert server.service._bytes == 0


def test_downloads_hold_up_nothing_else(images, internet, monkeypatch):
    monkeypatch.setattr("infer.serve.service.DOWNLOADS", 1)
    internet["good.example"] = ["127.0.0.1"]
    slow = f"http://good.example:{images.server_port}/slow"
    with Server(media_domains=("good.example",)) as server, httpx.Client(base_url=server.url) as client:
        images.asked.clear()
        start = time.monotonic()
        assert client.post("/v1/chat/completions", json=parts(slow, slow, slow, "data:,")).status_code == 400
        assert client.post("/v1/chat/completions", json=parts(PIXELS)).status_code == 200
        assert time.monotonic() - start < 2  # a download takes longer
        time.sleep(3)
        assert len(images.asked) <= 1  # those that had not begun do not
