"""Servers, and clients that know nothing of this package."""

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer
from support.receiver import Receiver
from support.servers import Serve


def serving() -> Iterator[Serve]:
    """Give a function that starts a server and opens a client for it; both end with the test, or its module."""
    with contextlib.ExitStack() as stack:

        def start(spec: Any = "echo", **options: Any) -> tuple[CrewServer, httpx.Client]:
            server = stack.enter_context(CrewServer(spec, **options))
            client = httpx.Client(base_url=server.url, headers=server.headers, timeout=10, trust_env=False)
            return server, stack.enter_context(client)

        yield start


serve = pytest.fixture(name="serve")(serving)
serve_for_module = pytest.fixture(scope="module", name="serve_for_module")(serving)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver of webhooks."""
    with Receiver() as running:
        yield running
