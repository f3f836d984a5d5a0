"""What records come to: standings, since when, and what to do. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_crew.cli.runs import Standing, classify, look_at
from prefect_crew.records.model import RecordPhase, RunRecord

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def record(**facts: Any) -> RunRecord:
    return RunRecord(
        **{
            "idempotency_key": "daily",
            "attempt": 1,
            "crew": "travel",
            "crew_url": "https://travel.example.com",
            "inputs_digest": "d" * 32,
            "owner": "o",
            "claimed_at": NOW - timedelta(seconds=20),
            "open_for": 20.0,
            **facts,
        }
    )


STARTED = {"phase": RecordPhase.STARTED, "kickoff_id": "k1", "kicked_off_at": NOW - timedelta(seconds=19)}
TURN = NOW - timedelta(seconds=5)


@pytest.mark.parametrize(
    ("facts", "owner_ended", "attended", "standing"),
    [
        pytest.param({}, False, True, Standing.CLAIMED, id="being-posted"),
        pytest.param({}, True, True, Standing.NOT_STARTED, id="claimed-by-a-dead-flow-run"),
        pytest.param({"open_for": 0.0}, False, True, Standing.NOT_STARTED, id="claimed-too-long-ago"),
        pytest.param({"permit": 1}, True, True, Standing.UNCERTAIN, id="sent-by-a-dead-flow-run"),
        pytest.param({"permit": 1, "open_for": 0.0}, False, True, Standing.UNCERTAIN, id="sent-too-long-ago"),
        pytest.param({"phase": RecordPhase.UNCERTAIN}, False, True, Standing.UNCERTAIN, id="uncertain"),
        pytest.param(STARTED, False, True, Standing.IN_FLIGHT, id="in-flight"),
        pytest.param({**STARTED, "human_since": TURN}, False, True, Standing.WAITING, id="waiting"),
        pytest.param(STARTED, False, False, Standing.ORPHANED, id="orphaned"),
        pytest.param({**STARTED, "human_since": TURN}, False, False, Standing.ORPHANED, id="orphaned-while-waiting"),
        pytest.param({"phase": RecordPhase.ENDED, "state": "failed"}, False, True, Standing.ENDED, id="ended"),
        pytest.param({"phase": RecordPhase.NOT_STARTED}, True, False, Standing.NOT_STARTED, id="not-started"),
    ],
)
def test_standing(facts: dict[str, Any], owner_ended: bool, attended: bool, standing: Standing):
    line = classify(record(**facts), NOW, owner_ended=owner_ended, attended=attended)
    assert line.standing is standing
    # Where a person has something to do, it says what.
    assert bool(line.todo) is (standing in (Standing.UNCERTAIN, Standing.ORPHANED, Standing.WAITING, Standing.ENDED))


def test_since_when_it_stands_so():
    assert classify(record(), NOW, owner_ended=False, attended=True).since == NOW - timedelta(seconds=20)
    assert classify(record(**STARTED), NOW, owner_ended=False, attended=True).since == STARTED["kicked_off_at"]
    waiting = classify(record(**STARTED, human_since=TURN), NOW, owner_ended=False, attended=True)
    assert waiting.since == TURN


def test_a_completed_run_needs_nothing():
    ended = record(phase=RecordPhase.ENDED, state="completed", ended_at=NOW)
    line = classify(ended, NOW, owner_ended=False, attended=True)
    assert (line.todo, line.since) == ("", NOW)


@pytest.mark.parametrize(
    ("crew", "shown"),
    [
        pytest.param("travel", "prefect-crew status travel k1", id="block"),
        pytest.param("travel.example.com", "prefect-crew status https://travel.example.com k1", id="address"),
    ],
)
def test_what_to_do_names_the_crew_as_a_command_takes_it(crew: str, shown: str):
    assert shown in classify(record(**STARTED, crew=crew), NOW, owner_ended=False, attended=False).todo


class Flows:
    """A store of which only the questions about flow runs are asked; it counts them."""

    def __init__(self, *, ended: bool = False, waiters: list[str] | None = None) -> None:
        self.ended, self.waiters, self.asked = ended, waiters or [], 0
        self.tried: list[RunRecord] = []

    async def owner_ended(self, record: RunRecord) -> bool:
        self.asked += 1
        return self.ended

    async def other_waiters(self, record: RunRecord, flow_run_id: str | None) -> list[str]:
        self.asked += 1
        return self.waiters

    async def attempts(self, idempotency_key: str) -> list[RunRecord]:
        return self.tried


async def test_flow_runs_are_asked_about_only_where_that_matters():
    for facts, asked in (({}, 1), (STARTED, 1), ({"phase": RecordPhase.UNCERTAIN}, 0), ({"phase": "ended"}, 0)):
        store = Flows(waiters=["f1"])
        await look_at(record(**facts), store, NOW)
        assert store.asked == asked
    orphans = Flows()
    orphans.tried = [record(**STARTED)]
    alone = await look_at(record(**STARTED), orphans, NOW)
    assert alone.standing is Standing.ORPHANED
    assert "Run again with its key" in alone.todo
    orphans.tried.append(record(attempt=2))
    assert "Its key leads to a later attempt" in (await look_at(record(**STARTED), orphans, NOW)).todo
    assert (await look_at(record(permit=1), Flows(ended=True), NOW)).standing is Standing.UNCERTAIN
