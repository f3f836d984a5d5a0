"""What tests of webhooks need: a secret, bodies of both generations, and a receiver's other side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prefect.client.orchestration import get_client
from starlette.types import ASGIApp

from prefect_crew._internal.web_server import open_listener
from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client.webhooks import BearerAuth, HumanInputWebhook, StreamWebhook, Webhooks
from prefect_crew.receiver.events import WebhookEvent
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.receiver.recent import RecentWebhooks
from prefect_crew.receiver.serve import ReceiverServer

SECRET = "a-secret-of-the-tests-that-is-long-enough"

BODIES: Mapping[str, Mapping[str, Any]] = {
    "task-first": {
        "kickoff_id": "k-1",
        "task_id": "research",
        "status": "completed",
        "output": "the output",
        "agent": "Researcher",
        "execution_time": 2.5,
    },
    "task-later": {
        "description": "the description",
        "name": "research",
        "expected_output": "a list",
        "summary": "the description...",
        "agent": "Researcher",
        "output": "the output",
        "output_json": None,
        "kickoff_id": "k-1",
        "meta": {"idempotency_key": "city/lisbon", "token": "the token"},
    },
    "step-first": {
        "kickoff_id": "k-1",
        "task_id": "research",
        "agent": "Researcher",
        "step_type": "thought",
        "content": "the content",
    },
    "step-later": {
        "prompt": "the prompt",
        "thought": "the thought",
        "tool": "search",
        "tool_input": "the input",
        "result": "the result",
        "kickoff_id": "k-1",
        "meta": {"idempotency_key": "city/lisbon"},
    },
    "crew-first": {
        "kickoff_id": "k-1",
        "status": "completed",
        "result": {"output": "the output", "tasks": [{"task_id": "research", "output": "the output"}]},
        "execution_time": 9.0,
        "meta": {"idempotency_key": "city/lisbon"},
    },
    "crew-later": {
        "kickoff_id": "k-1",
        "result": "the output",
        "result_json": None,
        "token_usage": {"total_tokens": 12, "prompt_tokens": 8, "completion_tokens": 4},
        "meta": {"idempotency_key": "city/lisbon"},
    },
    "human_input-first": {
        "execution_id": "k-1",
        "task_id": "plan",
        "task_output": "the output",
        "meta": {"idempotency_key": "city/lisbon"},
    },
    "human_input-later": {
        "kickoff_id": "k-1",
        "task_id": "plan",
        "output": "the output",
        "meta": {"idempotency_key": "city/lisbon"},
    },
    "stream": {
        "events": [
            {
                "id": "e-1",
                "execution_id": "k-1",
                "timestamp": "2026-01-01T00:00:00Z",
                "type": "crew_kickoff_started",
                "data": {"inputs": {"topic": "the input"}},
            },
            {
                "id": "e-2",
                "execution_id": "k-1",
                "timestamp": "2026-01-01T00:00:01Z",
                "type": "task_completed",
                "data": {"task_name": "research", "agent_role": "Researcher", "output": "the output"},
            },
        ]
    },
}
"""One body of each kind and generation, by `kind-generation`."""

SAID_BY_NOBODY = ("the output", "the content", "the thought", "the prompt", "the result", "the input", "the token")
"""What stands in these bodies and must not stand in an event."""


def url_of(hooks: Webhooks, kind: str) -> str:
    """Return the URL of one of a run's webhooks."""
    target = getattr(hooks, kind)
    return target if isinstance(target, str) else target.url


def headers_of(hooks: Webhooks, kind: str) -> dict[str, str]:
    """Return what a crew's server sends beside the body of one of a run's webhooks."""
    target = getattr(hooks, kind)
    if isinstance(target, HumanInputWebhook | StreamWebhook) and isinstance(target.authentication, BearerAuth):
        return {"Authorization": f"Bearer {target.authentication.token.get_secret_value()}"}
    return {}


class Kept(Forwarder):
    """Takes events and requests as a forwarder does, and keeps them."""

    def __init__(self) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.recent = RecentWebhooks()
        self.events: list[WebhookEvent] = []
        self.requests: list[FeedbackRequest] = []
        self.ready = True

    def start(self) -> None:
        """Do nothing."""

    def put(self, item: WebhookEvent | FeedbackRequest) -> None:
        """Keep it."""
        if isinstance(item, FeedbackRequest):
            self.requests.append(item)
        else:
            self.events.append(item)
            self.recent.add(item)

    @property
    def is_ready(self) -> bool:
        """As a test has set it."""
        return self.ready

    def report(self) -> dict[str, Any]:
        """Count them."""
        return {"received": len(self.events)}

    async def aclose(self) -> None:
        """Do nothing."""


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


async def until(true: Callable[[], Any], what: str, *, seconds: float = 30.0) -> None:
    """Wait until something is true; fail when it does not become so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        await asyncio.sleep(0.02)


async def events_of(idempotency_key: str, *, at_least: int = 1, seconds: float = 30.0) -> Sequence[Mapping[str, Any]]:
    """Return the crew.* events of a run from the Prefect server, oldest first, once there are so many."""
    wanted = {
        "event": {"prefix": ["crew."]},
        "resource": {"labels": {"prefect-crew.idempotency-key": [idempotency_key]}},
    }
    deadline = time.monotonic() + seconds
    while True:
        async with get_client() as client:
            answer = await client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})  # pyright: ignore[reportArgumentType]
        found = sorted(answer.json()["events"], key=lambda event: event["occurred"])
        if len(found) >= at_least:
            return found
        assert time.monotonic() < deadline, f"only {[event['event'] for event in found]} came of {idempotency_key}"
        await asyncio.sleep(0.1)
