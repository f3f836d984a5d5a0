"""What the tests of batches share."""

import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prefect_crew.batches.ledger import Ledger
from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, postgres_ledger
from support.postgres import Postgres
from support.scripts import script


class FileServer(ThreadingHTTPServer):
    """A web server of a few files, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def __call__(self, files: dict[str, bytes]) -> str:
        self.files = files
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Files(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
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


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def ledger_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the address of an empty ledger, in SQLite and in PostgreSQL."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    return postgres_ledger(request.getfixturevalue("postgres"))


@pytest.fixture
async def ledger(ledger_address: str) -> AsyncIterator[Ledger]:
    """Give the open ledger of a batch "b", in SQLite and in PostgreSQL."""
    async with Ledger(ledger_address, "b") as ledger:
        yield ledger


@pytest.fixture
async def other(ledger_address: str) -> AsyncIterator[Ledger]:
    """Give the same one as another process has it open."""
    async with Ledger(ledger_address, "b") as ledger:
        yield ledger


@pytest.fixture
def postgres_address(postgres: Postgres) -> str:
    """Give the address of an empty ledger in PostgreSQL."""
    return postgres_ledger(postgres)


@pytest.fixture
def batch(prefect_api: object, tmp_path: Path) -> Batches:
    """Give what runs batches, on a real Prefect server."""
    return Batches(tmp_path)


@pytest.fixture
def echo(crew_server: CrewServerFactory) -> CrewServer:
    """Give a crew that writes "on" and its topic."""
    return crew_server(script({"output": "on {{ topic }}"}, inputs=["topic"]))
