"""Downloads images that clients name, without letting clients reach what only this machine can reach.

Only hosts that the operator allowed are asked. Their names are resolved once, and the connection is made to the address
that was checked: a second DNS answer cannot differ from the first. Redirects are new connections, so they are checked
too. Proxies of the environment are not used, since a proxy would resolve the name again.
"""

import contextlib
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence

from llava_jax.console import InputError, shorten
from llava_jax.data.urls import Guard, NamedBytes, fetch, is_url

SPECIAL = ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("192.88.99.0/24")  # RFC 6890, 7526: not hosts
URL = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?([/?#][!-~]*)?", re.IGNORECASE)
DOMAIN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")


class NotFetched(InputError):
    """An image that the server is willing to download, but cannot."""


class Refused(InputError):
    """A host or an address that clients may not have the server connect to."""


def parse_domain(text: str) -> str:
    """A host whose images may be downloaded, or `*.` and a domain for all hosts in it.

    Raises:
      InputError: it is not one.
    """
    domain = text.lower().removesuffix(".")
    if not DOMAIN.fullmatch(domain):
        raise InputError(
            f"--allow-media-domain {shorten(text)}: must be a host name, or *. and a domain; without https://"
        )
    return domain


def media_guard(domains: Sequence[str], max_bytes: int, seconds: float) -> Guard:
    """What clients may have the server download, from `domains` (see `parse_domain`)."""
    connect = functools.partial(_connect, tuple(domains))
    handlers = (urllib.request.ProxyHandler({}), _HTTP(connect), _HTTPS(connect))
    return Guard(handlers, max_bytes, seconds)


def fetch_image(url: str, name: str, guard: Guard | None) -> NamedBytes:
    """Fetch the image of a `data:` or `http(s):` URL.

    Args:
      name: of the image in errors.
      guard: None to refuse downloads.

    Raises:
      NotFetched: a download fails.
      InputError: the URL is not one that clients may give.
    """
    if is_url(url):
        if guard is None:
            raise InputError(f"{name}: images of http: and https: URLs are not allowed here; send a data: URL")
        if not URL.fullmatch(url):
            raise InputError(f"{name}: {shorten(url)} is not a URL with a host name and without a user")
        try:
            data = fetch(url, guard)
        except Refused:
            raise
        except InputError as error:
            raise NotFetched(f"{name}: {error}") from None
    elif url[:5].lower() == "data:":
        data = fetch(url)
    else:
        raise InputError(f"{name}: {shorten(url)} is not a data: URL" + (" or http(s): URL" if guard else ""))
    data.name = name
    return data


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the internet: not private, loopback, link-local, multicast or reserved, nor an IPv6
    one that leads to an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address.sixtofour or address.is_site_local:
            return False
    if any(address in network for network in SPECIAL):  # Python releases differ in what they know of these
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _canonical(host: str) -> str:
    """A host's name, or its address without brackets."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host.lower().removesuffix(".")


def _connect(domains: Sequence[str], host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a host if it is allowed and all its addresses are public.

    Raises:
      Refused: it is not.
      OSError: it cannot be resolved or reached.
    """
    name = _canonical(host)
    if not any(name == _canonical(domain) or (domain[:2] == "*." and name.endswith(domain[1:])) for domain in domains):
        raise Refused(f"images of {shorten(host)} are not allowed here; send a data: URL")
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    for *_, place in found:
        if not is_public(ipaddress.ip_address(str(place[0]).partition("%")[0])):
            raise Refused(f"{shorten(host)} is not a host of the internet; send a data: URL")
    error: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in found:
        try:
            with contextlib.ExitStack() as failing:
                connection = failing.enter_context(socket.socket(family, kind, protocol))
                connection.settimeout(timeout)
                connection.connect(place)
                failing.pop_all()
                return connection
        except OSError as failure:
            error = failure
    raise error


Connect = Callable[[str, int, float], socket.socket]


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, connect: Connect):
        super().__init__()
        self.connect = connect

    def http_open(self, request):
        return self.do_open(functools.partial(_Connection, connect_to=self.connect), request)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, connect: Connect):
        super().__init__()
        self.connect, self.context = connect, ssl.create_default_context()

    def https_open(self, request):
        return self.do_open(functools.partial(_TLSConnection, connect_to=self.connect, context=self.context), request)


class _Connection(http.client.HTTPConnection):
    """Connects with a function of ours."""

    def __init__(self, host: str, *, connect_to: Connect, timeout: float):
        super().__init__(host, timeout=timeout)
        self.connect_to = connect_to

    def connect(self) -> None:
        self.sock = self.connect_to(self.host, self.port, float(self.timeout or 1))


class _TLSConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, host: str, *, connect_to: Connect, timeout: float, context: ssl.SSLContext):
        super().__init__(host, connect_to=connect_to, timeout=timeout)
        self.context = context

    def connect(self) -> None:
        super().connect()
        self.sock = self.context.wrap_socket(self.sock, server_hostname=self.host)
