"""What the tests of the receiver share."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_crew._internal.clock import utcnow
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import find_store
from prefect_crew.store.decision import Attempt
from prefect_crew.webhooks import Hook, hook_urls
from support.crew_database import begun, in_flight, request
from support.links import Chat, notifying
from support.prefect_server import PrefectServer
from support.processes import Process
from support.webhooks import SECRET, receiver_of, served

MOUNTED = "http://receiver/of/crews"


def mounted(**options: Any) -> Starlette:
    """Return an app with a receiver under a path, whose secret was changed since it signed the URLs of the tests."""
    return Starlette(routes=[Mount("/of/crews", create_receiver(f"{'n' * 40} {SECRET}", **options))])


@pytest.fixture
def key() -> str:
    """An idempotency key of the test's own."""
    return f"receiver-{uuid.uuid4()}"


@pytest.fixture
def new_attempt(key: str) -> Callable[..., Awaitable[Attempt]]:
    """Write an attempt: of a run in flight, by default `k-1`; without an id, its kickoff is being sent."""

    async def write(kickoff_id: str | None = "k-1", **facts: Any) -> Attempt:
        store, call = find_store(), request(key, **facts)
        return await begun(store, call) if kickoff_id is None else await in_flight(store, call, kickoff_id)

    return write


@pytest.fixture
def receiver_process(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[tuple[Process, int]]:
    """Run `prefect-crew receiver start` as a process of its own, and give it with its port once it listens."""
    with receiver_of(prefect_api.env(), tmp_path) as process:
        yield process


@pytest.fixture
async def client(prefect_api: PrefectServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a mounted receiver in this process, without a port."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(mounted()), base_url=MOUNTED) as client:
        yield client


@pytest.fixture
def urls() -> Callable[..., Webhooks]:
    """Make the webhooks of an attempt, for a day if not given otherwise."""

    def make(attempt: Attempt | str, *, base: str = MOUNTED, days: int = 1, **facts: Any) -> Webhooks:
        id_ = attempt if isinstance(attempt, str) else attempt.id
        return hook_urls(base, SECRET, Hook("crew", id_, utcnow() + timedelta(days=days), **facts))

    return make


@pytest.fixture
async def chat(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Chat]:
    """Links are sent to this chat; a mounted receiver serves their pages."""
    with Chat() as chat:
        async with served(mounted()) as url, notifying(chat):
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", f"{url}/of/crews/")
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
            yield chat
