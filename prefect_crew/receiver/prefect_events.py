"""From news to events on the Prefect server: which run it is about, and one request for many events.

The server's `POST /events` answers once it has the events (open source since 3.0, and Prefect Cloud), so what was not
answered can be sent again: `emit_event` hands over to a thread whose queue nothing bounds while the server is away.
Sending twice is harmless, since the server keeps one event of each id.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any
from uuid import uuid5

import httpx
from prefect.client.orchestration import get_client

from prefect_crew.events import resources_of
from prefect_crew.receiver.news import News
from prefect_crew.receiver.settling import attempt_of, unsettled
from prefect_crew.records import RecordStore, RunRecord, utcnow

__all__ = ["RecordCache", "event_of", "send_events", "settled_event", "transient"]

PREFIX = "crew.webhook."
HELD = 1000
"""Records that are remembered."""
KNOWN, MISSING, UNSETTLED = 600.0, 60.0, 1.0
"""Seconds for which a record, that there is none, and one that may soon say more are taken for true."""
AT_ONCE = 8
"""Records that are asked for at a time."""


def event_of(news: News, record: RunRecord | None) -> dict[str, Any]:
    """Return the event that tells a piece of news, as JSON. Without a record it is about the run key alone."""
    hook = news.hook
    if record is not None:
        resource, related = resources_of(record)
    else:
        run = f"{hook.run_key}/{hook.attempt}" if hook.attempt else hook.run_key
        resource = {"prefect.resource.id": f"prefect-crew.run.{run}", "prefect-crew.run-key": hook.run_key}
        related = []
    return {
        "id": str(news.id),
        "occurred": news.received.isoformat(),
        "event": PREFIX + news.name,
        "resource": resource,
        "related": related,
        "payload": {
            "run_key": hook.run_key,
            "attempt": hook.attempt if record is None else record.attempt,
            "claim": hook.claim,
            "kickoff_id": None if record is None else record.kickoff_id,
            "round": hook.round,
            "said": dict(news.said),
        },
    }


def settled_event(record: RunRecord, news: News) -> dict[str, Any]:
    """Return the event that a webhook has settled an uncertain kickoff."""
    event = event_of(news, record)
    return {**event, "event": "crew.settled", "id": str(uuid5(news.id, "settled")), "occurred": utcnow().isoformat()}


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
        keys = {(news.hook.run_key, news.hook.attempt) for news in batch}
        found = await asyncio.gather(*(self._find(*key) for key in keys))
        return dict(zip(keys, found, strict=True))

    async def _find(self, run_key: str, attempt: int | None) -> RunRecord | None:
        until, record = self._held.get((run_key, attempt), (0.0, None))
        if monotonic() < until:
            return record
        async with self._gate:
            record = attempt_of(await self._records.attempts(run_key), attempt)
        if record is not None and record.result is not None:
            record = record.model_copy(update={"result": None})
        self._held[run_key, attempt] = (monotonic() + _lasting(record, attempt), record)
        self._held.move_to_end((run_key, attempt))
        if len(self._held) > HELD:
            self._held.popitem(last=False)
        return record

    def forget(self, run_key: str, attempt: int | None) -> None:
        """Look this one up anew next time."""
        self._held.pop((run_key, attempt), None)


def _lasting(record: RunRecord | None, attempt: int | None) -> float:
    """Return for how many seconds what was found is taken for true."""
    if record is None:
        return MISSING
    return UNSETTLED if attempt is None or unsettled(record) else KNOWN
