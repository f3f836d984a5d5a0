"""What benchmarks start: a Prefect server and a receiver.

The server is on PostgreSQL with the settings of deployments/compose.yaml, or on SQLite.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx

from support.postgres import Postgres, find_postgres
from support.prefect_server import QUICK, PrefectServer, free_port

DATABASE = "BENCHMARK_DATABASE"
"""The environment variable with the URL of that server's database, as SQLAlchemy writes it."""
SECRET = "a-secret-of-the-benchmark-that-is-long-enough"

# What is left are the settings of deployments/compose.yaml.
QUICK.pop("PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL", None)


class DurablePostgres(Postgres):
    """PostgreSQL with its own defaults: that of the tests does not wait for the disk."""

    NOT_DURABLE = ()


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    programs = find_postgres()
    if programs is None:
        sys.exit("The benchmarks need PostgreSQL's programs (Debian: apt-get install postgresql).")
    with DurablePostgres(programs) as server:
        yield server


def prefect_server_of(environment: dict[str, str] | os._Environ[str] = os.environ) -> PrefectServer:
    """Return the server of PREFECT_API_URL, which somebody else has started, to be asked and named alone."""
    url = environment.get("PREFECT_API_URL")
    if not url:
        sys.exit("Set PREFECT_API_URL to a Prefect server of its own, or let benchmarks/run.py start one.")
    server = PrefectServer(Path(environment.get("PREFECT_HOME", "/nowhere")).parent)
    server.port = urlsplit(url).port or 4200
    return server


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, int]]:
    """Run a receiver, and have this process ask for webhooks; yield its URL and its process id."""
    url = f"http://127.0.0.1:{free_port()}"
    env = {"PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL": url, "PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET": SECRET}
    command = [Path(sys.executable).with_name("prefect-crew"), "receiver", "start", "--port", url.rpartition(":")[2]]
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(env)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the receiver did not start")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        for name in env:
            os.environ.pop(name)
        process.terminate()
        process.wait()
