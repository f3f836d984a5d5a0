"""What the tests of the receiver share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver.app import create_receiver
from prefect_crew.webhooks import Hook, hook_urls
from support.links import Chat, notifying
from support.prefect_server import PrefectServer
from support.processes import Process
from support.webhooks import SECRET, Kept, receiver_of, served


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
    """A client of a receiver in this process, without a port."""
    transport = httpx.ASGITransport(create_receiver(SECRET, forwarder=kept))
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        yield client


@pytest.fixture
def urls() -> Callable[..., Webhooks]:
    """Make the webhooks of a run, for a day if not given otherwise."""

    def make(key: str = "city/lisbon", *, base: str = "http://receiver", days: int = 1, attempt: int = 1) -> Webhooks:
        return hook_urls(base, SECRET, Hook("crew", key, datetime.now(UTC) + timedelta(days=days), attempt))

    return make


@pytest.fixture
async def chat(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Chat]:
    """Links are sent to this chat; a receiver serves their pages."""
    with Chat() as chat:
        async with served(create_receiver(SECRET)) as url, notifying(chat):
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", url)
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
            yield chat
