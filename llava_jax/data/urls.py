"""Images from URLs: downloads `http:` and `https:`, decodes `data:`, and converts `file:` to paths.

A download has limits on its size and its total time, so a server that trickles bytes fails as soon as one that sends
nothing. Within that time, broken connections and busy servers are retried.

Downloads use the standard library. httpx, which huggingface_hub uses, and urllib3 have timeouts per read, but none for
the whole download or for name resolution: the thread, the deadline, the size limit and the redirect rules below would
be needed on top of them too.
"""

import base64
import dataclasses
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

from llava_jax.console import InputError, first_line, note, shorten

MAX_DOWNLOAD = 256 * 2**20
MAX_REDIRECTS = 5
STALL_SECONDS = 8.0  # until the first byte, and that a download may fall behind MIN_RATE
MIN_RATE = 50_000  # bytes per second
DEADLINE = 300.0  # seconds per download
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.IncompleteRead)
BUSY = (429, 502, 503, 504)  # statuses that are worth a retry
WAITS = (0.5, 1.0, 2.0)  # seconds before each retry, unless the server's Retry-After is longer
MAX_WAIT = 10.0  # a server that asks for a longer one is not asked again


class NamedBytes(bytes):
    """The bytes of a file, with its name for errors."""

    name: str


@dataclasses.dataclass(frozen=True)
class Guard:
    """What others may have this machine download.

    Attributes:
      handlers: of urllib, which decide where connections are made.
      max_bytes, seconds: of a download.
    """

    handlers: tuple[urllib.request.BaseHandler, ...]
    max_bytes: int
    seconds: float


def fetch(source, guard: Guard | None = None):
    """Fetch an image: an `http(s):` or `data:` URL becomes `NamedBytes`, a `file:` URL becomes a path. Anything else is
    returned unchanged.

    Args:
      guard: for URLs that others chose.

    Raises:
      InputError: the URL cannot be fetched, or is not of an image.
    """
    if not isinstance(source, str):
        return source
    scheme, colon, rest = source[:9].partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "file" and rest.startswith("/"):
        return _path_of(source)
    if scheme not in ("http", "https", "data") or (scheme != "data" and not rest.startswith("//")):
        return source
    data = NamedBytes(_decode(source) if scheme == "data" else _download(source, guard))
    data.name = shorten(source)
    return data


def is_url(source: str) -> bool:
    """Whether a source needs a download."""
    return source[:8].lower().startswith(("http://", "https://"))


def display_name(name: str) -> str:
    """The name of an image for lists; a `data:` URL, which contains the image itself, is shortened."""
    return shorten(name) if name[:5].lower() == "data:" else name


# ---------------------------------------------------------------- downloads


def _download(url: str, guard: Guard | None = None) -> bytes:
    """Download a URL within `DEADLINE` seconds, or `STALL_SECONDS` if the server sends next to nothing."""
    deadline = time.monotonic() + (guard.seconds if guard else DEADLINE)
    for wait in (*WAITS, math.inf):
        attempt = _Attempt(url, guard)
        attempt.start()
        attempt.wait(deadline)
        if not attempt.error:
            return bytes(attempt.data)
        wait = max(wait, attempt.retry_after)
        if not attempt.is_transient or wait > MAX_WAIT or time.monotonic() + wait > deadline:
            break
        if wait > WAITS[-1] and not guard:
            note(f"{attempt.error}; trying again in {wait:.0f} seconds")
        time.sleep(wait)
    assert attempt.error
    raise attempt.error


class _Attempt(threading.Thread):
    """A download in a thread that can be abandoned, since name resolution, TLS and headers have no deadline of their
    own."""

    def __init__(self, url: str, guard: Guard | None):
        super().__init__(daemon=True)
        self.url, self.data, self.abandoned = url, bytearray(), False
        self.handlers = guard.handlers if guard else ()
        self.max_bytes = guard.max_bytes if guard else MAX_DOWNLOAD
        self.error: InputError | None = None
        self.is_transient, self.retry_after = False, 0.0  # whether the error may pass, and when at the earliest

    def wait(self, deadline: float) -> None:
        """Wait until the attempt ends.

        Raises:
          InputError: it takes too long.
        """
        start = time.monotonic()
        while self.is_alive():
            received = len(self.data)
            end = min(deadline, start + STALL_SECONDS + received / MIN_RATE)
            if time.monotonic() >= end:
                self.abandoned = True
                reason = f"{received:,} bytes in {end - start:.0f} seconds: too slow"
                raise InputError(f"{shorten(self.url)}: cannot be fetched ({reason})")
            self.join(end - time.monotonic())

    def run(self) -> None:
        name = shorten(self.url)
        try:
            with self._open() as answer:
                if (answer.length or 0) > self.max_bytes:
                    raise InputError(f"{name}: larger than {self.max_bytes >> 20} MiB")
                while not self.abandoned and (block := answer.read1(2**16)):
                    self.data += block
                    if len(self.data) > self.max_bytes:
                        raise InputError(f"{name}: larger than {self.max_bytes >> 20} MiB")
                if answer.length:
                    self.is_transient = True
                    raise InputError(f"{name}: cannot be fetched (the response is {answer.length:,} bytes short)")
        except InputError as error:
            self.error = error
        except urllib.error.HTTPError as error:
            self.is_transient, self.retry_after = error.code in BUSY, _seconds(error.headers.get("Retry-After"))
            self.error = InputError(f"{name}: the server returned {error.code} {shorten(error.reason)}")
            error.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            self.is_transient = isinstance(reason, TRANSIENT)
            reason = first_line(reason) if isinstance(reason, BaseException) else shorten(reason)
            self.error = InputError(f"{name}: cannot be fetched ({shorten(reason)})")
        except Exception as error:  # other exceptions that a server can cause in Python's HTTP client
            self.error = InputError(f"{name}: cannot be fetched ({type(error).__name__})")

    def _open(self) -> http.client.HTTPResponse:
        """Follow redirects to the final response, without reading the bodies of redirects."""
        url, opener = self.url, urllib.request.build_opener(_NoRedirects, *self.handlers)
        for _ in range(MAX_REDIRECTS + 1):
            request = urllib.request.Request(url, headers={"User-Agent": "llava-jax"})
            try:
                return opener.open(request, timeout=STALL_SECONDS)
            except urllib.error.HTTPError as error:
                to = error.headers.get("Location")
                if error.code not in REDIRECTS or not to:
                    raise
                error.close()
            url = urllib.parse.quote(urllib.parse.urljoin(url, to), safe=string.punctuation)
            if not is_url(url):
                raise InputError(
                    f"{shorten(self.url)}: redirects to {shorten(to)}; only http: and https: are supported"
                )
        raise InputError(f"{shorten(self.url)}: redirects more than {MAX_REDIRECTS} times")


def _seconds(text: str | None) -> float:
    """The seconds of a `Retry-After` header; 0 if it is missing or a date."""
    return float(text) if text and re.fullmatch("[0-9]+", text) else 0.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `_Attempt`, since urllib reads their whole bodies and follows them to `ftp:`."""

    def http_error_302(self, request, file, code, message, headers):
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


# ---------------------------------------------------------------- data: and file:


def _decode(url: str) -> bytes:
    """Decode a `data:` URL (RFC 2397): base64 in either alphabet, padded or not, or percent-encoding."""
    head, comma, body = url.partition(",")
    kind, *settings = (part.strip().lower() for part in head[len("data:") :].split(";"))
    if not comma:
        raise InputError(f"{shorten(url)}: a data: URL without a comma before the data")
    if kind and not kind.startswith("image/"):
        raise InputError(f"{shorten(url)}: a data: URL of {shorten(kind, 40)}, not of an image")
    try:
        data = urllib.parse.unquote_to_bytes(body)
        if "base64" in settings:
            data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise InputError(f"{shorten(url)}: a data: URL with invalid {'base64' if settings else 'text'}") from None
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
        raise InputError(f"{shorten(url)}: a file on host {shorten(host, 40)}; only local files can be read")
    try:
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path))
    except ValueError:
        raise InputError(f"{shorten(url)}: a file: URL that is not valid Unicode") from None
    if path in ("", "/"):
        raise InputError(f"{shorten(url)}: a file: URL without a file name")
    return path
