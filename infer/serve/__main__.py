"""Serve a model over OpenAI's API.

    python -m infer.serve
    python -m infer.serve --checkpoint DIR --host 0.0.0.0 --port 8000 --slots 16

Clients of OpenAI's API use it with the base URL http://HOST:PORT/v1; `/` is a page to ask from a browser. Without
`--checkpoint`, a small bundled model answers.
"""

import argparse
import asyncio
import dataclasses
import ipaddress
import os
import socket
import sys
import time

from infer.flags import add_model_flags, load_engine
from infer.generate import TRAINED_ON, use_bundled
from infer.serve.settings import Settings, digest_key
from llava_jax.console import (
    InputError,
    Parser,
    elapsed,
    first_line,
    flag_of,
    integer,
    note,
    plural,
    ranges,
    run_main,
    shorten,
)
from llava_jax.data.buckets import MAX_SLOTS, MIN_CONTEXT
from llava_jax.data.templates import get_template

KEY = "LLAVA_API_KEY"
CONTEXT = 4096
DISPATCH_SECONDS = 0.1  # how often tokens are sent
SWITCH_SECONDS = 5e-4  # for which the scheduler's thread and the event loop may hold up each other
STOP_SECONDS = 10.0  # for the engine's thread, at the end


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.serve", description="Serve a model over OpenAI's API.")
    add_model_flags(p, default=f"the bundled model, trained on {TRAINED_ON}")
    server = p.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default 127.0.0.1)")
    server.add_argument("--port", type=integer(0, 65535), default=8000, metavar="N", help="0 for any (default 8000)")
    server.add_argument(
        "--slots", type=integer(1, MAX_SLOTS), default=16, metavar="N", help="requests that run at a time (default 16)"
    )
    server.add_argument(
        "--context", type=integer(MIN_CONTEXT, 2**20), metavar="N",
        help=f"positions of a request, prompt and answer; default: {CONTEXT}, or the model's own if that is less",
    )  # fmt: skip
    server.add_argument("--warm-up", action="store_true", help="compile everything before the first request")
    server.add_argument(
        "--served-model-name", action="append", metavar="NAME",
        help="that clients ask for; default: the name of the checkpoint; repeatable",
    )  # fmt: skip
    server.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"that clients must send; repeatable; the variable {KEY} is one too, and not visible to other users",
    )  # fmt: skip
    server.add_argument(
        "--allow-media-domain", action="append", default=[], metavar="HOST",
        help="download images that clients name from this host, or from all of *.DOMAIN; default: none; repeatable",
    )  # fmt: skip
    server.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="let pages of this origin call the API; * for any; default: none; repeatable",
    )  # fmt: skip
    server.add_argument(
        "--trust-special-tokens", action="store_true",
        help="read special tokens and role marks that clients type as such, not as text",
    )  # fmt: skip
    server.add_argument("--log-prompts", action="store_true", help="log what is asked and answered")
    add_limits(p.add_argument_group("limits"))
    return p


def add_limits(group) -> None:
    """Add the flags of `Settings`' numbers."""
    for field in dataclasses.fields(Settings):
        if "range" in field.metadata:
            about, default = field.metadata["help"], field.default
            group.add_argument(
                flag_of(field.name), type=field.metadata["range"], default=default, metavar="N",
                help=about if "default" in about else f"{about} (default {default:g})",
            )  # fmt: skip


def main() -> int:
    args = parser().parse_args()
    check_installed()
    settings = read_settings(args)
    if args.template:
        get_template(args.template)
    with listen(args.host, args.port) as listener:
        warn_if_open(listener, settings.keys)
        return run_server(args, settings, listener)


def check_installed() -> None:
    """Check that the libraries of a server are installed.

    Raises:
      InputError: they are not.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'llava-jax[serve]'") from None


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings that the flags and the environment give.

    Raises:
      InputError: a name or a key is not one.
    """
    from infer.serve.media import parse_domain

    name = "shapes" if args.checkpoint is None else os.path.basename(os.path.abspath(args.checkpoint))
    keys = [*args.api_key, *filter(None, [os.environ.get(KEY)])]
    if any(not (key.isascii() and key.isprintable() and key.strip() == key and key) for key in keys):
        raise InputError(f"--api-key, {KEY}: a key is printable ASCII without spaces around it")
    numbers = {name: getattr(args, name) for name in ranges(Settings)}
    return Settings(
        models=tuple(args.served_model_name or [name]),
        keys=tuple(digest_key(key) for key in keys),
        media_domains=tuple(parse_domain(domain) for domain in args.allow_media_domain),
        origins=tuple(args.allow_origin),
        trust_special_tokens=args.trust_special_tokens,
        log_prompts=args.log_prompts,
        **numbers,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which accepts connections only when the server is ready.

    Raises:
      InputError: the address is not one of this machine, or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {shorten(host)} --port {port}: cannot be listened on ({first_line(error)})") from None


def warn_if_open(listener: socket.socket, keys: tuple[bytes, ...]) -> None:
    """Warn if others can use the server without a key."""
    host = listener.getsockname()[0]
    if not keys and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        note(f"warning: everybody who reaches {host} can use this server; --api-key or {KEY} asks for a key")


def run_server(args: argparse.Namespace, settings: Settings, listener: socket.socket) -> int:
    """Load the model, and serve it until a signal."""
    from infer.serve.server import serve
    from infer.serve.service import Service

    if args.checkpoint is None:
        use_bundled(args, "serving")
    engine = load_engine(args)
    context = args.context or min(CONTEXT, engine.context)
    scheduler = engine.scheduler(args.slots, context, dispatch_seconds=DISPATCH_SECONDS)
    if args.warm_up:
        compile_ahead(scheduler)
    else:
        note("the first requests of each size compile, and wait for it; --warm-up does that before")
    sys.setswitchinterval(SWITCH_SECONDS)
    service = Service(engine, scheduler, settings)
    ended_by_signal = asyncio.run(serve(service, listener))
    if not service.stop(STOP_SECONDS):
        os._exit(0 if ended_by_signal else 1)  # the thread is in a computation that cannot be interrupted
    return 0 if ended_by_signal else 1


def compile_ahead(scheduler) -> None:
    """Compile for all sizes of prompts and images."""
    from infer.warm_up import warm_up

    start = time.perf_counter()
    with elapsed("compiling"):
        count = warm_up(scheduler)
    note(f"compiled {plural(count, 'function')} in {time.perf_counter() - start:.0f} s")


def run() -> None:
    """The command `llava-serve`."""
    run_main(main)


if __name__ == "__main__":
    run()
