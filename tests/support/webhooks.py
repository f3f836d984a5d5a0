"""What tests of webhooks need: a secret, bodies of both generations, and a receiver's other side."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from starlette.types import ASGIApp

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.devserver.web_server import open_listener
from prefect_crew.receiver.serve import ReceiverServer
from support.corpus import cases
from support.environment import program
from support.prefect_server import free_port
from support.processes import Process
from support.waiting import until

DATABASE = "PREFECT_INTEGRATIONS_CREW_DATABASE_URL"
SECRET = "a-secret-of-the-tests-that-is-long-enough"

_CORPUS = cases("webhook")
BODIES: Mapping[str, Mapping[str, Any]] = {
    name: _CORPUS[name]["body"]
    for name in (
        *("task-first", "task-later", "step-first", "step-later", "crew-first", "crew-later"),
        *("human_input-first", "human_input-later", "stream"),
    )
}
"""One body of each kind and generation, by `kind-generation`."""

SAID_BY_NOBODY = ("the output", "the content", "the thought", "the prompt", "the result", "the input", "the token")
"""What stands in these bodies and must not stand in an event."""


def url_of(hooks: Webhooks, kind: str) -> str:
    """Return the URL of one of a run's webhooks."""
    target = getattr(hooks, kind)
    return target if isinstance(target, str) else target.url


@contextmanager
def receiver_of(env: dict[str, str], tmp_path: Path) -> Iterator[tuple[Process, int]]:
    """Run `prefect-crew receiver start` as a process of its own, and give it with its port once it listens."""
    port = free_port()
    env |= {"PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET": SECRET, "PREFECT_LOGGING_LEVEL": "DEBUG"}
    env[DATABASE] = os.environ[DATABASE]  # whoever waits reads what the receiver writes
    command = [program("prefect-crew"), "receiver", "start", "--port", str(port)]
    with Process(command, log=tmp_path / "webhooks.log", env=env) as process:
        process.wait_for("Listening for webhooks")
        yield process, port


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """Serve a receiver on a free port of loopback and give its address."""
    bound = open_listener("127.0.0.1", 0)
    server = ReceiverServer(app)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        await until(lambda: server.started, "the receiver starts")
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        bound.close()


async def events_of(idempotency_key: str, *, at_least: int = 1, prefix: str = "crew.") -> Sequence[Mapping[str, Any]]:
    """Return the events of a run from the Prefect server, oldest first, once there are so many."""
    labels = {"prefect-crew.idempotency-key": [idempotency_key]}
    wanted = {"event": {"prefix": [prefix]}, "resource": {"labels": labels}}

    async def events() -> Sequence[Mapping[str, Any]]:
        async with get_client() as client:
            answer = await client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})  # pyright: ignore[reportArgumentType]
        events = sorted(answer.json()["events"], key=lambda event: event["occurred"])
        return events if len(events) >= at_least else ()

    return await until(events, f"{at_least} events of {idempotency_key}")
