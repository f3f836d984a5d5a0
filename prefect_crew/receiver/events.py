"""From a webhook's body to an event on the Prefect server."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from time import monotonic
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx
from prefect.client.orchestration import get_client

from prefect_crew.artifacts.events import resources_of
from prefect_crew.client._parsing import as_count, as_object
from prefect_crew.client.models import StreamEvent, WebhookBody
from prefect_crew.records.model import RecordStore, RunRecord, utcnow
from prefect_crew.runs.webhook_resolve import attempt_of, unresolved
from prefect_crew.webhooks import Hook

MAX_STREAMED = 200
"""Events of one stream delivery that are passed on."""
_MAX_ID = 300
_MAX_NAME = 100
_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_TIME = re.compile(r"[\d.:+TZ -]{1,40}", re.ASCII)
_TYPE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")
_ENDS = re.compile(
    r"(crew|flow)(_kickoff|_execution)?_(completed|failed|finished|paused|stopped)|method_execution_failed|.*human_.*"
)
"""Types of streamed events that say as much as a crew or human-input webhook."""


class Rank(IntEnum):
    """What is given up first when there is too much: the lowest."""

    STEP = 0
    STREAM = 1
    TASK = 2
    CREW = 3
    """The end of a run, or a question to a person: what somebody waits for."""


_RANKS = {"step": Rank.STEP, "task": Rank.TASK, "crew": Rank.CREW, "human_input": Rank.CREW}


@dataclass(frozen=True)
class News:
    """One event to be.

    `name` follows `crew.webhook.`. `said` is what the body says, by nobody confirmed. `id` is the same for the same
    delivery, so that the server keeps one of two. `said_key` is the idempotency key in the body's `meta`, if it has
    one.
    `output` is what a person is to judge.
    """

    hook: Hook
    name: str
    rank: Rank
    id: UUID
    received: datetime
    said: Mapping[str, Any]
    kickoff_id: str | None = None
    said_key: str | None = None
    output: str | None = field(default=None, repr=False)


def digest_of(hook: Hook, body: bytes) -> bytes:
    """Return what tells one delivery from another: equal for the same body at the same URL."""
    facts = repr((hook.kind, hook.idempotency_key, hook.attempt, hook.round)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(facts + b"\0" + body).digest()


def news_of(hook: Hook, body: WebhookBody, *, digest: bytes, received: datetime) -> list[News]:
    """Return what a delivery tells: one piece of news, or one for each event of a stream up to `MAX_STREAMED`."""
    if hook.kind == "stream":
        return [
            _streamed(hook, event, digest, number, received) for number, event in enumerate(body.events[:MAX_STREAMED])
        ]
    said: dict[str, Any] = {
        "kickoff_id": _id(hook, body.kickoff_id),
        "task_id": _id(hook, body.task_id),
        "state": str(body.state) if body.state else None,
        "execution_time": body.execution_time,
        "total_tokens": body.usage.total_tokens if body.usage else None,
    }
    if hook.names:
        said |= {"name": body.name, "agent": body.agent, "tool": body.tool, "step_type": body.step_type}
    return [
        News(
            hook=hook,
            name=hook.kind,
            rank=_RANKS[hook.kind],
            id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/{digest.hex()}"),
            received=received,
            said=dict(_filled(said)),
            kickoff_id=body.kickoff_id,
            said_key=_idempotency_key(body.meta),
            output=body.output if hook.kind == "human_input" and hook.names else None,
        )
    ]


def _streamed(hook: Hook, event: StreamEvent, digest: bytes, number: int, received: datetime) -> News:
    lowered = (event.type or "").lower()
    type_ = lowered if _TYPE.fullmatch(lowered) else "other"
    data = as_object(event.data)
    said: dict[str, Any] = {
        "id": _id(hook, event.id),
        "kickoff_id": _id(hook, event.execution_id),
        "at": event.timestamp if hook.names or _TIME.fullmatch(event.timestamp or "") else None,
    }
    said["total_tokens"] = as_count(data.get("total_tokens"))
    if hook.names:
        said |= {"name": data.get("task_name"), "agent": data.get("agent_role")}
    # An event that comes once more in another batch is still the same.
    same = (
        f"{hook.idempotency_key}/{hook.attempt}/{event.execution_id}/{event.id}"
        if event.id
        else f"{digest.hex()}/{number}"
    )
    return News(
        hook=hook,
        name=f"stream.{type_}",
        rank=Rank.CREW if _ENDS.fullmatch(type_) else Rank.STREAM,
        id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/stream/{type_}/{same}"),
        received=received,
        said=dict(_filled(said)),
        kickoff_id=event.execution_id,
        said_key=_idempotency_key(data.get("meta")),
    )


def _filled(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, str):
            # Ids are whole or absent: half an id is another id.
            text = value if key.endswith("id") else " ".join(value.split())[:_MAX_NAME]
            if text:
                yield key, text
        elif isinstance(value, int | float):
            yield key, value


def _id(hook: Hook, value: str | None) -> str | None:
    """Return an id; None for what may be a sentence with a secret in it, where the crew has secret inputs."""
    if value is None or len(value) > _MAX_ID:
        return None
    return value if hook.names or _ID.fullmatch(value) else None


def _idempotency_key(meta: Any) -> str | None:
    key = as_object(meta).get("idempotency_key")
    return key if isinstance(key, str) else None


PREFIX = "crew.webhook."
HELD = 1000
"""Records that are remembered."""
KNOWN, MISSING, UNRESOLVED = 600.0, 60.0, 1.0
"""Seconds for which a record, that there is none, and one that may soon say more are taken for true."""
AT_ONCE = 8
"""Records that are asked for at a time."""


def event_of(news: News, record: RunRecord | None) -> dict[str, Any]:
    """Return the event that tells a piece of news, as JSON. Without a record it is about the idempotency key alone."""
    hook = news.hook
    if record is not None:
        resource, related = resources_of(record)
    else:
        run = f"{hook.idempotency_key}/{hook.attempt}" if hook.attempt else hook.idempotency_key
        resource = {"prefect.resource.id": f"prefect-crew.run.{run}", "prefect-crew.run-key": hook.idempotency_key}
        related = []
    return {
        "id": str(news.id),
        "occurred": news.received.isoformat(),
        "event": PREFIX + news.name,
        "resource": resource,
        "related": related,
        "payload": {
            "idempotency_key": hook.idempotency_key,
            "attempt": hook.attempt if record is None else record.attempt,
            "claim": hook.claim,
            "kickoff_id": None if record is None else record.kickoff_id,
            "round": hook.round,
            "said": dict(news.said),
        },
    }


def resolved_event(record: RunRecord, news: News) -> dict[str, Any]:
    """Return the event that a webhook has resolved an uncertain kickoff."""
    event = event_of(news, record)
    return {**event, "event": "crew.resolved", "id": str(uuid5(news.id, "resolved")), "occurred": utcnow().isoformat()}


async def send_events(events: Sequence[dict[str, Any]]) -> None:
    """Give events to the Prefect server, and return once it has them.

    Raises:
        httpx.HTTPError: It is away, or refuses them.
    """
    async with get_client() as client:
        await client.request("POST", "/events", json=list(events))  # pyright: ignore[reportArgumentType] - a true route


def transient(error: Exception) -> bool:
    """Return whether the Prefect API may take the same a little later: it is away, overloaded, or refuses our key."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (401, 403, 408, 429)
    return isinstance(error, httpx.TransportError | TimeoutError)


class RecordCache:
    """Finds the records of runs, and remembers a bounded number of them for a while.

    What an event needs of a record no longer changes once its kickoff id is known. One that is not there, though claims
    are written before kickoffs, will not come: rows of a batch have theirs elsewhere.
    """

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._held: OrderedDict[tuple[str, int | None], tuple[float, RunRecord | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    async def find(self, batch: Iterable[News]) -> dict[tuple[str, int | None], RunRecord | None]:
        """Return the record of each run and attempt that the news is about, None where there is none.

        Raises:
            httpx.HTTPError: The Prefect API is away or refuses.
        """
        keys = {(news.hook.idempotency_key, news.hook.attempt) for news in batch}
        found = await asyncio.gather(*(self._find(*key) for key in keys))
        return dict(zip(keys, found, strict=True))

    async def _find(self, idempotency_key: str, attempt: int | None) -> RunRecord | None:
        until, record = self._held.get((idempotency_key, attempt), (0.0, None))
        if monotonic() < until:
            return record
        async with self._gate:
            record = attempt_of(await self._records.attempts(idempotency_key), attempt)
        if record is not None and record.result is not None:
            record = record.model_copy(update={"result": None})
        self._held[idempotency_key, attempt] = (monotonic() + _lasting(record, attempt), record)
        self._held.move_to_end((idempotency_key, attempt))
        if len(self._held) > HELD:
            self._held.popitem(last=False)
        return record

    def forget(self, idempotency_key: str, attempt: int | None) -> None:
        """Look this one up anew next time."""
        self._held.pop((idempotency_key, attempt), None)


def _lasting(record: RunRecord | None, attempt: int | None) -> float:
    """Return for how many seconds what was found is taken for true."""
    if record is None:
        return MISSING
    return UNRESOLVED if attempt is None or unresolved(record) else KNOWN
