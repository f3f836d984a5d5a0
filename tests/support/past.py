"""Attempts as they stand in the crew database after something has happened."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from prefect_crew._internal.clock import utcnow
from prefect_crew.runs.database import find_store
from prefect_crew.store.attempts import of_key
from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.schema import attempts, kickoff_ids, results

EMPTY: dict[str, Any] = dict.fromkeys(Attempt.__slots__)


def key() -> str:
    """Return a key that no other test has."""
    return f"key {uuid.uuid4()}"


def new_attempt(key: str | None = None, **facts: Any) -> Attempt:
    """Return the first attempt at a key, one of its own if none is given; `kickoff_id` sets its first and last id."""
    now = utcnow().timestamp()
    plain: dict[str, Any] = {"id": uuid.uuid4().hex, "key": key or f"key {uuid.uuid4()}", "number": 1}
    plain |= {"state": AttemptState.POSTING, "replaced": False, "crew": "travel", "crew_url": "https://travel.test"}
    plain |= {"inputs_digest": "d" * 32, "has_webhooks": False, "owner": uuid.uuid4().hex, "flow_run_count": 0}
    plain |= {"begun_at": now, "counts_until": now, "human_seconds": 0.0, "first_id": facts.get("kickoff_id")}
    return Attempt(**EMPTY | plain | facts)


def put(attempt: Attempt, result: Any = None) -> Attempt:
    """Write an attempt, with its kickoff id and its result. Not to be called on a running event loop."""
    asyncio.run(aput(attempt, result))
    return attempt


async def aput(attempt: Attempt, result: Any = None) -> Attempt:
    """Write an attempt, with its kickoff id and its result."""
    await aput_all([attempt], result)
    return attempt


async def aput_all(several: Sequence[Attempt], result: Any = None) -> None:
    """Write attempts, each with its kickoff ids and the same result."""
    await find_store().run(_insert, several, result)


def stored(key: str) -> list[Attempt]:
    """Return the attempts of a key. Not to be called on a running event loop."""
    return asyncio.run(find_store().run(of_key, key))


@transaction("write")
def _insert(transaction: Transaction, several: Sequence[Attempt], result: Any) -> None:
    transaction.lock()
    values = [{column.name: getattr(attempt, column.name) for column in attempts.columns} for attempt in several]
    transaction.connection.execute(sa.insert(attempts), values)
    ids = [
        {"crew_url": attempt.crew_url, "kickoff_id": kickoff_id, "attempt_id": attempt.id, "number": number}
        for attempt in several
        for number, kickoff_id in enumerate(dict.fromkeys(filter(None, (attempt.first_id, attempt.kickoff_id))), 1)
    ]
    if ids:
        transaction.connection.execute(sa.insert(kickoff_ids), ids)
    if result is not None:
        bodies = [{"attempt_id": attempt.id, "body": result} for attempt in several]
        transaction.connection.execute(sa.insert(results), bodies)
