"""A receiver of webhooks that keeps all it gets; written with nothing but the standard library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.waiting import wait_until


class Listener:
    """Takes POSTs on a free loopback port; a context manager."""

    def __init__(self) -> None:
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(listener.take(self.path, dict(self.headers.items()), body))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the standard library
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        raise NotImplementedError

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Delivery:
    """One POST: its path, its headers and its JSON."""

    path: str
    headers: Mapping[str, str]
    body: Any


class Receiver(Listener):
    """Keeps what it gets; `answer` is the status that it answers with, after `delay` seconds."""

    def __init__(self, *, answer: int = 200, delay: float = 0.0) -> None:
        super().__init__()
        self.answer = answer
        self.delay = delay
        self.got: list[Delivery] = []

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        self.got.append(Delivery(path, headers, json.loads(body)))
        time.sleep(self.delay)
        return self.answer

    def at(self, path: str) -> list[Any]:
        """Return the bodies that came to one path, in order of arrival."""
        return [delivery.body for delivery in self.got if delivery.path == path]

    def wait_for(self, enough: Callable[[Receiver], bool]) -> None:
        """Wait until what came is enough; fail when it does not come."""
        wait_until(lambda: enough(self), "enough webhooks")
