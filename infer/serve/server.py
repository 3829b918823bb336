"""Runs the application on a socket, with uvicorn, until a signal, and drains it then."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.serve.app import make_app
from infer.serve.service import Service
from infer.serve.settings import Settings
from llava_jax.console import note, plural

IDLE_SECONDS = 30  # that a connection stays open between requests
GRACE_SECONDS = 5  # for the last bytes of answers, after they were cancelled
SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def serve(service: Service, listener: socket.socket) -> bool:
    """Serve until SIGINT or SIGTERM (or `service.end`), or until the engine fails, and answer what had been asked by
    then. A second signal ends the process at once.

    Args:
      listener: a bound socket.

    Returns:
      Whether the engine works.
    """
    settings, loop = service.settings, asyncio.get_running_loop()
    server = _Server(
        uvicorn.Config(
            make_app(service),
            http=functools.partial(_Protocol, settings=settings),  # type: ignore[arg-type]  # makes a protocol
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )

    def on_signal(number: int) -> None:
        if service.end.is_set():
            note("stopped")
            os._exit(128 + number)
        if running := len(service.answering):
            waiting = f"{plural(running, 'request')} may take {settings.drain_seconds:g} s"
            note(f"shutting down: {waiting}; repeat the signal to stop at once")
        service.end.set()

    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal, number)
    service.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    note(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}")
    until = [serving, *(asyncio.create_task(event.wait()) for event in (service.end, service.dead))]
    await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
    await service.drain(settings.drain_seconds)
    server.should_exit = True
    await serving
    return service.worker.error is None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


class _Protocol(H11Protocol):
    """Closes connections of clients that take too long to send a request, or that stop reading an answer, and those
    that are far too many: uvicorn has no limits on either."""

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._receiving: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > 2 * self._settings.connections:  # above the limit itself, requests get 503
            return transport.abort()
        transport.set_write_buffer_limits(0)  # whatever is not sent yet counts as a stop, while it is closed too
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()

    def _watch_request(self) -> None:
        """Run a timer while a part of a request has been received."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            seconds = self._settings.receive_seconds + GRACE_SECONDS  # the application answers 408 before
            self._receiving = self._receiving or self.loop.call_later(seconds, self.transport.abort)
        elif self._receiving:
            self._receiving.cancel()
            self._receiving = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._settings.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._receiving, self._stalled):
            if timer:
                timer.cancel()
