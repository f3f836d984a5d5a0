"""A person who looks at the crew's page and resolves what is uncertain."""

from __future__ import annotations

import asyncio
import time

from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import CrewError
from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
from prefect_crew.records.store import PrefectRecords

__all__ = ["resolve"]


def resolve(server: CrewServer, idempotency_key: str) -> None:
    """Resolve a run by what its server has accepted under its key."""
    started = [id_ for id_, meta in server.accepted.items() if meta["idempotency_key"] == idempotency_key]

    async def say() -> None:
        records = PrefectRecords()
        record = await unresolved(idempotency_key, records)
        if started:
            await resolve_started(record, started[-1], records)
        else:
            await resolve_never_started(record, records)

    deadline = time.monotonic() + 150
    while True:
        try:
            return asyncio.run(say())
        except CrewError as error:
            # Whoever sent it is dead, which the record cannot know: its time has to pass.
            if "may still be" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)
