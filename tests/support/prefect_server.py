"""Real Prefect servers, each a process of its own with its own home, database and port.

A new SQLite database costs six seconds of migrations, so the first one is kept as a template in pytest's cache, one
for each version of Prefect.
"""

import contextlib
import os
import shutil
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal, Self

import httpx

from support.environment import isolated
from support.processes import Process, ProcessError, Program
from support.waiting import LIMIT

QUICK = {
    # The defaults write one task run in a transaction, and hold events back for five seconds.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
}
"""Settings that every server of the tests gets."""

PORT_TRIES = 3


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now; someone else may take it before it is used."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class PrefectServer(Program):
    """A `prefect server start` process."""

    def __init__(
        self,
        folder: Path,
        *,
        database_url: str | None = None,
        template: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.home = folder / "home"
        self.log = folder / "server.log"
        self.database = None if database_url else self.home / "prefect.db"
        self.port = free_port()
        self._database_url = database_url
        self._template = template
        self._env = dict(env or {})
        self._has_answered = False

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        return self._database_url or f"sqlite+aiosqlite:///{self.database}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def env(self, *, home: Path | None = None, **extra: str) -> dict[str, str]:
        """Return the whole environment of a process that is a client of this server."""
        return isolated(home or self.home, {"PREFECT_API_URL": self.api_url, **extra})

    def artifact_url(self, artifact_id: str, *, ui: Literal["v1", "v2"]) -> str:
        """Return the address of an artifact's page in one of Prefect's two interfaces.

        `v1` is the one that it showed until 3.8, `v2` the newer. Every version since 3.8 has both.
        """
        return f"{self.ui_url}{'/v2' if ui == 'v2' else ''}/artifacts/artifact/{artifact_id}"

    def start(self) -> Self:
        """Start it and wait until it answers; about 5 seconds, 12 with a new database."""
        if self.running:
            return self
        self.home.mkdir(parents=True, exist_ok=True)
        if self.database and self._template and self._template.exists() and not self.database.exists():
            shutil.copyfile(self._template, self.database)
        variables = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database_url, **QUICK, **self._env}
        for left in reversed(range(1 if self._has_answered else PORT_TRIES)):  # who has clients keeps its port
            options = ["--host", "127.0.0.1", "--port", str(self.port)]
            command = [sys.executable, "-m", "prefect", "server", "start", *options]
            variables["PREFECT_SERVER_UI_API_URL"] = self.api_url  # else its pages ask port 4200
            process = self._process = Process(command, log=self.log, env=isolated(self.home, variables))
            if self._answers(process, time.monotonic() + LIMIT):
                break
            process.kill()
            if not left or "already in use" not in process.tail():
                raise ProcessError(f"The Prefect server did not start:\n{process.tail()}")
            self.port = free_port()  # between free_port and the bind someone else took it
        self._has_answered = True
        if self.database and self._template and not self._template.exists():
            self._template.parent.mkdir(parents=True, exist_ok=True)
            partial = self._template.with_suffix(f".{os.getpid()}")
            with closing(sqlite3.connect(self.database)) as source, closing(sqlite3.connect(partial)) as target:
                source.backup(target)  # one consistent file, of a database that is in use
            partial.replace(self._template)
        return self

    def _answers(self, process: Process, deadline: float) -> bool:
        # trust_env: a proxy in the environment is no way to loopback.
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while process.running and time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.api_url}/health").status_code == httpx.codes.OK and process.running:
                        return True
                time.sleep(0.1)
        return False

    def forget_store(self) -> None:
        """Delete the Variable that names a crew database, and all others, of a server on SQLite."""
        assert self.database is not None
        with closing(sqlite3.connect(self.database, timeout=LIMIT)) as database, database:
            database.execute("DELETE FROM variable")

    def begin_anew(self) -> None:
        """Delete from a server on SQLite all but the types of blocks, as if it had just been started."""
        assert self.database is not None
        with httpx.Client(base_url=self.api_url, timeout=LIMIT, trust_env=False) as client:
            for automation in client.post("/automations/filter", json={}).raise_for_status().json():
                client.delete(f"/automations/{automation['id']}").raise_for_status()  # in memory too
        with closing(sqlite3.connect(self.database, timeout=LIMIT)) as database, database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                if not table.startswith(("alembic", "block_type", "block_schema")):
                    database.execute(f'DELETE FROM "{table}"')


@contextlib.contextmanager
def connected(server: PrefectServer, home: Path) -> Iterator[PrefectServer]:
    """Make this process, all its threads and the processes it starts clients of `server`.

    The variables are really set, and Prefect's global settings read again, since a temporary settings context is not
    seen by threads that someone else has started. Logs and events are sent before it ends.
    """
    with environment({"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(home)}):
        try:
            yield server
        finally:
            drain()


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process and have Prefect read its settings again; set back at the end."""
    from prefect import context

    before, settings = {name: os.environ.get(name) for name in variables}, context.GLOBAL_SETTINGS_CONTEXT
    os.environ.update(variables)
    context.refresh_global_settings_context()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        context.GLOBAL_SETTINGS_CONTEXT = settings  # to read them again takes 20 ms


def drain(timeout: float = 10.0) -> None:
    """Send what Prefect's background threads hold of logs and events, at most `timeout` seconds each.

    Not to be called on a running event loop.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=timeout)
    EventsWorker.drain_all(timeout=timeout)


def stored_texts(server: PrefectServer) -> str:
    """Return all that the database of a server on SQLite holds, a row a line. Not to be called on an event loop."""
    drain()
    assert server.database is not None
    with closing(sqlite3.connect(f"file:{server.database}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return "\n".join(str(row) for table in tables for row in database.execute(f'SELECT * FROM "{table}"'))
