"""What the tests of runs share."""

import logging
import uuid
from collections.abc import AsyncIterator

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs import stop
from prefect_crew.testing import CrewServerFactory
from support.webhooks import SECRET, served


@pytest.fixture
def key() -> str:
    """Provide an idempotency key of the test's own."""
    return f"kickoff {uuid.uuid4()}"


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that returns its input `text`."""
    return crew_server("echo")


@pytest.fixture
def all_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Capture what is said at the level of information as well."""
    caplog.set_level(logging.INFO, "prefect_crew")


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every 0.2 seconds whether the flow run was cancelled."""
    monkeypatch.setattr(stop, "LOOK_EVERY", 0.2)


@pytest.fixture
async def receiver(prefect_api: object, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Serve a receiver and switch webhooks on; the process has heard of none before."""
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        yield url
