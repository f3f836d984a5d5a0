"""`costs`: the days that are asked for, what is unknown, and JSON."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

from prefect_crew.client.models import TokenUsage
from prefect_crew.records.model import RecordPhase, RunRecord
from support.commands import Command
from support.prefect_server import PrefectServer
from support.records import new_record, put

PERIOD = ("--from", "2001-05-01", "--to", "2001-05-02")
"""Years ago, when no other test's runs ended."""


def ended(day: str, crew: str, cost: float | None) -> RunRecord:
    """Return the record of a run that ended late on a day."""
    at = {"phase": RecordPhase.ENDED, "ended_at": datetime.fromisoformat(f"{day}T23:59:59").replace(tzinfo=UTC)}
    usage = cost and TokenUsage(total_tokens=12, prompt_tokens=10)
    return new_record(crew=crew, kickoff_id=str(uuid.uuid4()), usage=usage, cost=cost, **at)


def test_runs_of_the_days_that_are_asked_for_are_added_up(prefect_api: PrefectServer, here: Command):
    for run in (
        ended("2001-05-01", "travel", 0.25),
        ended("2001-05-02", "travel", None),
        ended("2001-05-02", "news", 2.5),
        ended("2001-06-01", "news", 100.0),
    ):
        asyncio.run(put(run))
    told = here("costs", *PERIOD)
    assert told.out.splitlines() == [
        "Crew\tRuns\tTokens\tCost\tWithout tokens",
        "news\t1\t12\t2.50\t0",
        "travel\t2\t12\t0.250\t1",
        "together\t3\t24\t2.75\t1",
    ]
    assert "1 of 3 runs reported no tokens; the cost of 1 of 3 runs is unknown." in told.err
    assert "Records are kept for 30 days" in told.err
    days = here("costs", "--by", "day", *PERIOD, "-o", "json").json
    found = [(one["name"], one["cost"], one["runs"], one["reported"]) for one in days["groups"]]
    assert found == [("2001-05-01", 0.25, 1, 1), ("2001-05-02", 2.5, 2, 1)]
    usage = {"total_tokens": 24, "prompt_tokens": 20}
    assert days["total"] == {"runs": 3, "reported": 2, "priced": 2, "usage": usage, "cost": 2.75}
    assert here("costs", "--from", "1999-01-01", "--to", "1999-01-02").out == "No run has ended in this time.\n"
    wrong = here("costs", "--from", "May")
    assert (wrong.code, "--from" in wrong.err, "May" in wrong.err) == (2, True, True)
