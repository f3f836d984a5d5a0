"""`costs`: the days that are asked for, what is unknown, and JSON."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

from prefect_crew.client.models import TokenUsage
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from support.commands import Command
from support.prefect_server import PrefectServer
from support.records import key, put

PERIOD = ("--from", "2001-05-01", "--to", "2001-05-02")
"""Years ago, when no other test's runs ended."""


def ended(day: str, crew: str, cost: float | None) -> None:
    """Write down that a run ended late on a day."""
    record = RunRecord(
        idempotency_key=key(),
        attempt=1,
        phase=RecordPhase.ENDED,
        kickoff_id=str(uuid.uuid4()),
        ended_at=datetime.fromisoformat(f"{day}T23:59:59").replace(tzinfo=UTC),
        crew=crew,
        crew_url="https://crew.example",
        inputs_digest="d",
        owner=uuid.uuid4().hex,
        claimed_at=utcnow(),
        usage=None if cost is None else TokenUsage(total_tokens=12, prompt_tokens=10),
        cost=cost,
    )
    asyncio.run(put(record))


def test_runs_of_the_days_that_are_asked_for_are_added_up(prefect_api: PrefectServer, here: Command):
    for day, crew, cost in (
        ("2001-05-01", "travel", 0.25),
        ("2001-05-02", "travel", None),
        ("2001-05-02", "news", 2.5),
        ("2001-06-01", "news", 100.0),
    ):
        ended(day, crew, cost)
    told = here("costs", *PERIOD)
    assert told.code == 0
    assert told.out.splitlines() == [
        "Crew\tRuns\tTokens\tCost\tWithout tokens",
        "news\t1\t12\t2.50\t0",
        "travel\t2\t12\t0.250\t1",
        "together\t3\t24\t2.75\t1",
    ]
    assert "1 of 3 runs reported no tokens; the cost of 1 of 3 runs is unknown." in told.err
    days = here("costs", "--by", "day", *PERIOD, "-o", "json").json
    assert [(one["name"], one["cost"], one["runs"], one["reported"]) for one in days["groups"]] == [
        ("2001-05-01", 0.25, 1, 1),
        ("2001-05-02", 2.5, 2, 1),
    ]
    assert days["total"] == {
        "runs": 3,
        "reported": 2,
        "priced": 2,
        "usage": {"total_tokens": 24, "prompt_tokens": 20},
        "cost": 2.75,
    }


def test_a_time_without_runs_and_a_day_that_is_none(prefect_api: PrefectServer, here: Command):
    assert here("costs", "--from", "1999-01-01", "--to", "1999-01-02").out == "No run has ended in this time.\n"
    wrong = here("costs", "--from", "May")
    assert (wrong.code, "--from" in wrong.err, "May" in wrong.err) == (2, True, True)
