"""A person who looks at the crew's page and resolves what is uncertain."""

from __future__ import annotations

import asyncio
import re

import pytest
import sqlalchemy as sa

from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import CrewError
from prefect_crew.runs.database import find_store
from prefect_crew.runs.resolve import resolve_never_started, resolve_started
from prefect_crew.store import attempts
from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import PREPARING, Attempt, AttemptState
from prefect_crew.store.schema import questions
from support.batches import let_an_hour_pass

__all__ = ["age_answers", "attempts_of", "is_in_doubt", "let_an_hour_pass", "resolve"]


def attempts_of(idempotency_key: str) -> list[Attempt]:
    """Return what the crew database of this test has of a key."""
    return asyncio.run(find_store().run(attempts.of_key, idempotency_key))


def is_in_doubt(found: list[Attempt]) -> bool:
    """Whether nobody knows what became of the last kickoff of a key whose caller is dead."""
    return bool(found) and found[-1].state in (*PREPARING, AttemptState.UNCERTAIN)


def resolve(server: CrewServer, idempotency_key: str) -> None:
    """Resolve a run by what its server has accepted under its key, after all time that its kickoff may have."""

    async def say() -> None:
        found = await find_store().run(attempts.of_key, idempotency_key)
        started = [id_ for id_, meta in server.accepted.items() if meta["idempotency_key"] == idempotency_key]
        known = [id_ for id_ in started if id_ not in {attempt.first_id for attempt in found}]
        if known:
            await resolve_started(idempotency_key, known[-1], "a test")
        else:
            await resolve_never_started(idempotency_key, "a test")

    if not (last := attempts_of(idempotency_key)[-1]).is_free(asyncio.run(find_store().run(attempts.time_now))):
        assert last.deadline is not None
        with pytest.raises(CrewError, match=re.escape("may still be sent, or on its way")):
            asyncio.run(say())
        asyncio.run(let_an_hour_pass())
    asyncio.run(say())


@transaction("write")
def age_answers(transaction: Transaction) -> None:
    """Let an hour pass since each answer: who gave it and has not sent it is dead."""
    transaction.lock()
    transaction.connection.execute(sa.update(questions).values(answered_at=questions.c.answered_at - 3600))
