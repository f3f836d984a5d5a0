"""A crew database for tests: a clock that they set, and short ways to say what a call asks for."""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass
from typing import Any

from prefect_crew.store.attempts import begin, ended, started
from prefect_crew.store.database import Store, Transaction, transaction
from prefect_crew.store.decision import STARTS, Attempt, AttemptState, Decision, Request
from prefect_crew.store.news import tell

CREW = "https://crew.test"
BEGINNING = 1_800_000_000.0


@dataclass
class Clock:
    """The time of a store, in seconds since 1970."""

    now: float = BEGINNING

    def __call__(self) -> float:
        return self.now


def request(key: str = "daily", **facts: Any) -> Request:
    """Return what a new call asks for: another call than all before."""
    plain: dict[str, Any] = {"crew": "travel", "crew_url": CREW, "inputs_digest": "of the inputs"}
    return Request(key=key, **{**plain, "owner": uuid.uuid4().hex, **facts})


def once_more(call: Request, **facts: Any) -> Request:
    """Return the request of another call that asks for the same."""
    return dataclasses.replace(call, owner=uuid.uuid4().hex, **facts)


async def begun(store: Store, call: Request) -> Attempt:
    """Begin, and return the new attempt."""
    decision = await store.run(begin, call)
    assert decision.step in STARTS, decision
    assert decision.attempt is not None
    return decision.attempt


async def in_flight(store: Store, call: Request, kickoff_id: str = "", timeout: float = 3600.0) -> Attempt:
    """Begin, and write the kickoff id."""
    attempt = (await store.run(started, await begun(store, call), kickoff_id or uuid.uuid4().hex, timeout)).attempt
    assert attempt is not None
    return attempt


async def over(store: Store, call: Request, state: Any = AttemptState.COMPLETED, **end: Any) -> Attempt:
    """Begin, start and end a run."""
    attempt = await in_flight(store, call)
    assert await store.run(ended, attempt, str(attempt.kickoff_id), state, **end)
    return attempt


async def step_of(store: Store, call: Request) -> str:
    """Return the step that `begin` takes."""
    decision: Decision = await store.run(begin, call)
    return str(decision.step)


@transaction("write")
def add_news(transaction: Transaction, topic: str, kind: str, **values: Any) -> None:
    """Write news, and nothing else."""
    tell(transaction, transaction.lock(), topic, kind, **values)
