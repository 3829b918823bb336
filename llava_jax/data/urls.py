"""Images behind URLs: `http:` and `https:` ones are downloaded, `data:` ones decoded, `file:` ones become paths.

A download has bounds on its size and on its time as a whole: a server that sends a byte now and then is given up as
soon as one that sends nothing. Within that time a connection that breaks, or a busy server, is tried again.

Downloads use the standard library. httpx, which huggingface_hub uses, and urllib3 have timeouts for each read but none
for the whole, and none for finding a server's address: the thread, the deadline, the bound on the size and the rules
for redirects below would be the same on top of them.
"""

import base64
import http.client
import math
import os
import re
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from llava_jax.console import InputError, first_line, shorten

MAX_DOWNLOAD = 256 * 2**20
MAX_REDIRECTS = 5
PATIENCE = 8.0  # seconds until the first byte, and that a download may fall behind the slowest rate
SLOWEST = 50_000  # bytes a second
DEADLINE = 300.0  # seconds for all of it
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.IncompleteRead)
BUSY = (429, 502, 503, 504)  # statuses of servers that may answer a little later
WAITS = (0.5, 1.0, 2.0)  # seconds before a download is tried again, unless the server asks for more by Retry-After


class Fetched(bytes):
    """The bytes of a file, and what errors call it."""

    name: str


def fetch(source):
    """An image behind a URL, to be read more than once: an `http(s):` or `data:` URL as the `Fetched` bytes of a file,
    a `file:` URL as a path. Anything else as it is.

    Raises:
      InputError: it cannot be fetched, or is no URL of an image.
    """
    if not isinstance(source, str):
        return source
    scheme, colon, rest = source[:9].partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "file" and rest.startswith("/"):
        return _path_of(source)
    if scheme not in ("http", "https", "data") or (scheme != "data" and not rest.startswith("//")):
        return source
    data = Fetched(_decode(source) if scheme == "data" else _download(source))
    data.name = shorten(source)
    return data


def is_url(source: str) -> bool:
    """Whether it is to be downloaded."""
    return source[:8].lower().startswith(("http://", "https://"))


def label(name: str) -> str:
    """What lists call an image: its name, but for a `data:` URL, which is the image itself."""
    return shorten(name) if name[:5].lower() == "data:" else name


# ---------------------------------------------------------------- downloads


def _download(url: str) -> bytes:
    """What a server answers, within `DEADLINE` seconds, or `PATIENCE` if it sends next to nothing."""
    deadline = time.monotonic() + DEADLINE
    for wait in (*WAITS, math.inf):
        attempt = _Attempt(url)
        attempt.start()
        attempt.wait(deadline)
        if not attempt.error:
            return bytes(attempt.data)
        wait = max(wait, attempt.retry_after)
        if not attempt.is_transient or time.monotonic() + wait > deadline:
            break
        time.sleep(wait)
    raise attempt.error


class _Attempt(threading.Thread):
    """A download in a thread, which can be left behind: finding the server's address, TLS and headers have no deadline
    of their own."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.data, self.abandoned = url, bytearray(), False
        self.error: InputError | None = None
        self.is_transient, self.retry_after = False, 0.0  # whether the error may pass, and when at the earliest

    def wait(self, deadline: float) -> None:
        """Wait for the end of the attempt.

        Raises:
          InputError: it takes too long.
        """
        start = time.monotonic()
        while self.is_alive():
            received = len(self.data)
            end = min(deadline, start + PATIENCE + received / SLOWEST)
            if time.monotonic() >= end:
                self.abandoned = True
                reason = f"{received:,} bytes in {end - start:.0f} seconds: too slow"
                raise InputError(f"{shorten(self.url)}: cannot be fetched ({reason})")
            self.join(end - time.monotonic())

    def run(self) -> None:
        name = shorten(self.url)
        try:
            with self._open() as answer:
                if (answer.length or 0) > MAX_DOWNLOAD:
                    raise InputError(f"{name}: larger than {MAX_DOWNLOAD >> 20} MiB")
                while not self.abandoned and (block := answer.read1(2**16)):
                    self.data += block
                    if len(self.data) > MAX_DOWNLOAD:
                        raise InputError(f"{name}: larger than {MAX_DOWNLOAD >> 20} MiB")
                if answer.length:
                    self.is_transient = True
                    raise InputError(f"{name}: cannot be fetched (it ends {answer.length:,} bytes too soon)")
        except InputError as error:
            self.error = error
        except urllib.error.HTTPError as error:
            self.is_transient, self.retry_after = error.code in BUSY, _seconds(error.headers.get("Retry-After"))
            self.error = InputError(f"{name}: the server answers {error.code} {shorten(error.reason)}")
            error.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            self.is_transient = isinstance(reason, TRANSIENT)
            reason = first_line(reason) if isinstance(reason, BaseException) else shorten(reason)
            self.error = InputError(f"{name}: cannot be fetched ({shorten(reason)})")
        except Exception as error:  # whatever else a server can make of Python's HTTP client
            self.error = InputError(f"{name}: cannot be fetched ({type(error).__name__})")

    def _open(self) -> http.client.HTTPResponse:
        """The answer that redirects lead to; bodies of redirects are not read."""
        url, opener = self.url, urllib.request.build_opener(_NoRedirects)
        for _ in range(MAX_REDIRECTS + 1):
            request = urllib.request.Request(url, headers={"User-Agent": "llava-jax"})
            try:
                return opener.open(request, timeout=PATIENCE)
            except urllib.error.HTTPError as error:
                to = error.headers.get("Location")
                if error.code not in REDIRECTS or not to:
                    raise
                error.close()
            url = urllib.parse.quote(urllib.parse.urljoin(url, to), safe=string.punctuation)
            if not is_url(url):
                raise InputError(f"{shorten(self.url)}: redirects to {shorten(to)}; only http: and https: are followed")
        raise InputError(f"{shorten(self.url)}: redirects more than {MAX_REDIRECTS} times")


def _seconds(text: str | None) -> float:
    """What a `Retry-After` header asks for; 0 if it has none, or a date."""
    return float(text) if text and re.fullmatch("[0-9]+", text) else 0.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `_Attempt`: urllib reads their bodies whole, and follows them to `ftp:`."""

    def http_error_302(self, request, file, code, message, headers):
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


# ---------------------------------------------------------------- data: and file:


def _decode(url: str) -> bytes:
    """What a `data:` URL holds (RFC 2397), in base64 of either alphabet, padded or not, or percent-encoded."""
    head, comma, body = url.partition(",")
    kind, *settings = (part.strip().lower() for part in head[len("data:") :].split(";"))
    if not comma:
        raise InputError(f"{shorten(url)}: a data: URL without a comma, and so without data")
    if kind and not kind.startswith("image/"):
        raise InputError(f"{shorten(url)}: a data: URL of {shorten(kind, 40)}, not of an image")
    try:
        data = urllib.parse.unquote_to_bytes(body)
        if "base64" in settings:
            data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise InputError(f"{shorten(url)}: a data: URL with broken {'base64' if settings else 'text'}") from None
    if not data:
        raise InputError(f"{shorten(url)}: a data: URL without data")
    return data


def _path_of(url: str) -> str:
    """The path in a `file:` URL (RFC 8089)."""
    host, path = "", url[len("file:") :]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
    if host.lower() not in ("", "localhost"):
        raise InputError(f"{shorten(url)}: a file of host {shorten(host, 40)}; only those of this machine can be read")
    try:
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path))
    except ValueError:
        raise InputError(f"{shorten(url)}: a file: URL that is no Unicode") from None
    if path in ("", "/"):
        raise InputError(f"{shorten(url)}: a file: URL that names no file")
    return path
