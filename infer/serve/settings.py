"""What the operator of the server decides: limits, keys, what is logged."""

import dataclasses
import hashlib
import hmac
from typing import Any

from llava_jax.console import MAX_INT32, Range, check_ranges, integer, number


def _(default: Any, allowed: Range, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"range": allowed, "help": about})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a server. Those that have a range are flags too.

    Attributes:
      models: the names that clients may ask for; the first is the one in answers.
      keys: SHA-256 digests of API keys; none for a server that asks for no key.
      media_domains: see `media.parse_domain`.
      origins: of other web pages that may call the API (CORS); "*" for any.
      log_prompts: log what is asked and answered.

    Raises:
      InputError: a number is out of range.
    """

    models: tuple[str, ...]
    keys: tuple[bytes, ...] = dataclasses.field(default=(), repr=False)
    media_domains: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    trust_special_tokens: bool = False
    log_prompts: bool = False
    queue: int = _(256, integer(0, 65536), "requests that may wait for a slot; more are refused with 429")
    temperature: float = _(1.0, number(0, 2), "of requests without one")
    max_tokens: int = _(MAX_INT32, integer(1, MAX_INT32), "the most that an answer may have; default: the context")
    max_images: int = _(16, integer(0, 1024), "images of a request")
    max_body_mb: int = _(64, integer(1, 4096), "MiB of a request")
    max_media_mb: int = _(16, integer(1, 1024), "MiB of a downloaded image")
    media_seconds: float = _(10.0, number(0.1, 300), "for a downloaded image")
    receive_seconds: float = _(60.0, number(0.1, 3600), "for a client to send a request")
    stall_seconds: float = _(60.0, number(0.1, 3600), "that a client may stop reading its answer")
    drain_seconds: float = _(30.0, number(0, 3600), "that answers may take to finish after SIGTERM")
    connections: int = _(1000, integer(1, 65536), "connections at a time; requests on more are refused with 503")

    def __post_init__(self):
        check_ranges(self)

    @property
    def max_body(self) -> int:
        """Bytes of a request."""
        return self.max_body_mb << 20

    @property
    def max_bodies(self) -> int:
        """Bytes of all requests at a time, downloaded images included."""
        return max(4 * self.max_body, 2**28)

    def accepts_key(self, key: str) -> bool:
        """Whether an API key is one of ours, in a time that does not depend on the keys."""
        digest = digest_key(key)
        return sum(hmac.compare_digest(digest, ours) for ours in self.keys) > 0  # compares all


def digest_key(key: str) -> bytes:
    """The SHA-256 digest of an API key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
