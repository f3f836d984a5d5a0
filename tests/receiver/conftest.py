"""What the tests of the receiver share."""

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver.app import create_receiver
from prefect_crew.webhooks import Hook, hook_urls
from support.links import Chat, notifying
from support.prefect_server import PrefectServer
from support.processes import Process
from support.webhooks import SECRET, Kept, receiver_of, served

MOUNTED = "http://receiver/of/crews"


def mounted(**options: Any) -> Starlette:
    """Return an app with a receiver under a path, whose secret was changed since it signed the URLs of the tests."""
    return Starlette(routes=[Mount("/of/crews", create_receiver(f"{'n' * 40} {SECRET}", **options))])


@pytest.fixture
def key() -> str:
    """An idempotency key of the test's own."""
    return f"receiver-{uuid.uuid4()}"


@pytest.fixture
def receiver_process(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[tuple[Process, int]]:
    """Run `prefect-crew receiver start` as a process of its own, and give it with its port once it listens."""
    with receiver_of(prefect_api.env(), tmp_path) as process:
        yield process


@pytest.fixture
def kept() -> Kept:
    """What the receiver hands on, kept."""
    return Kept()


@pytest.fixture
async def client(kept: Kept) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a mounted receiver in this process, without a port."""
    transport = httpx.ASGITransport(mounted(forwarder=kept))
    async with httpx.AsyncClient(transport=transport, base_url=MOUNTED) as client:
        yield client


@pytest.fixture
def urls() -> Callable[..., Webhooks]:
    """Make the webhooks of a run, for a day if not given otherwise."""

    def make(key: str = "city/lisbon", *, base: str = MOUNTED, days: int = 1, attempt: int = 1) -> Webhooks:
        hook = Hook("crew", key, datetime.now(UTC) + timedelta(days=days), attempt)
        return hook_urls(base, SECRET, hook)

    return make


@pytest.fixture
async def chat(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Chat]:
    """Links are sent to this chat; a mounted receiver serves their pages."""
    with Chat() as chat:
        async with served(mounted()) as url, notifying(chat):
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", f"{url}/of/crews/")
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
            yield chat
