"""What the tests of batches share."""

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.scripts import script


class FileServer(ThreadingHTTPServer):
    """A web server of a few files, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.users: list[str] = []

    def __call__(self, files: dict[str, bytes]) -> str:
        self.files = files
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Files(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if user := self.headers["Authorization"]:
            self.server.users.append(base64.b64decode(user.removeprefix("Basic ")).decode())
        content = self.server.files.get(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@pytest.fixture
def httpserver() -> Iterator[FileServer]:
    """Give a function that serves a mapping of paths to contents and returns its URL; `requests` are its paths."""
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def batch(prefect_api: object, tmp_path: Path) -> Batches:
    """Give what runs batches, on a real Prefect server."""
    return Batches(tmp_path)


@pytest.fixture
def echo(crew_server: CrewServerFactory) -> CrewServer:
    """Give a crew that writes "on" and its topic."""
    return crew_server(script({"output": "on {{ topic }}"}, inputs=["topic"]))
