"""Clients that know nothing of this package, and a receiver of webhooks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefect_crew.devserver.server import LocalServer
from support.servers import ClientOf, Finished


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Give a function that opens a plain HTTP client, with the token, for a server on a port."""
    clients: list[httpx.Client] = []

    def open_client(server: LocalServer) -> httpx.Client:
        clients.append(httpx.Client(base_url=server.url, headers=server.headers, timeout=10, trust_env=False))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
def finished() -> Finished:
    """Give a function that polls a run until its state stays as it is, and returns the last status body."""

    def poll(client: httpx.Client, kickoff_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            answer = client.get(f"/status/{kickoff_id}")
            word = str(answer.json().get("state") or answer.json().get("status"))
            if word.upper() not in ("RUNNING", "STARTED", "PENDING"):
                return answer.json()
            time.sleep(0.01)
        raise AssertionError(f"run {kickoff_id} did not end within 20 s")

    return poll
