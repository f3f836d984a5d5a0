"""What may be removed, and what never: pure, and on a real Prefect server."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_crew.pruning import parse_age, prunable, prune
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RecordPhase, RunRecord
from support.prefect_server import PrefectServer

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
BEFORE = NOW - timedelta(days=90)
OLD, NEW = BEFORE - timedelta(days=1), BEFORE + timedelta(days=1)


def record(key: str, phase: RecordPhase, at: datetime, *, attempt: int = 1, **facts: Any) -> RunRecord:
    return RunRecord(
        run_key=key,
        attempt=attempt,
        phase=phase,
        crew="c",
        crew_url="https://c.example.com",
        inputs_digest="d",
        owner="o",
        claimed_at=at - timedelta(minutes=5),
        ended_at=at if phase is RecordPhase.ENDED else None,
        kickoff_id="k" if phase in (RecordPhase.ENDED, RecordPhase.STARTED) else None,
        **facts,
    )


@pytest.mark.parametrize(
    ("phase", "at", "goes"),
    [
        pytest.param(RecordPhase.ENDED, OLD, True, id="old-and-ended"),
        pytest.param(RecordPhase.ENDED, NEW, False, id="young-and-ended"),
        pytest.param(RecordPhase.NOT_STARTED, OLD, True, id="old-and-not-started"),
        pytest.param(RecordPhase.NOT_STARTED, NEW, False, id="young-and-not-started"),
        pytest.param(RecordPhase.STARTED, OLD, False, id="in-flight"),
        pytest.param(RecordPhase.UNCERTAIN, OLD, False, id="uncertain"),
        pytest.param(RecordPhase.CLAIMED, OLD, False, id="claimed"),
    ],
)
def test_what_goes(phase: RecordPhase, at: datetime, goes: bool):
    assert bool(prunable([record("a", phase, at)], BEFORE)) is goes


@pytest.mark.parametrize("later", [RecordPhase.UNCERTAIN, RecordPhase.STARTED, RecordPhase.ENDED])
def test_a_key_goes_as_a_whole_or_not_at_all(later: RecordPhase):
    first = record("a", RecordPhase.ENDED, OLD)
    second = record("a", later, NEW, attempt=2)
    assert prunable([second, first], BEFORE) == []
    other = record("b", RecordPhase.ENDED, OLD)
    assert prunable([second, other, first], BEFORE) == [other]


def test_the_first_attempt_which_a_new_call_would_claim_goes_last():
    attempts = [record("a", RecordPhase.ENDED, OLD, attempt=number) for number in (3, 1, 2)]
    assert [going.attempt for going in prunable(attempts, BEFORE)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90d", 90 * 86400), ("12h", 43200), ("2w", 14 * 86400), ("30", 30 * 86400), ("1.5m", 90), ("0s", 0)],
)
def test_ages(text: str, seconds: float):
    assert parse_age(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "90 days"])
def test_what_is_no_age(text: str):
    with pytest.raises(ValueError, match="is no age"):
        parse_age(text)


async def test_records_and_left_over_notes_go_from_a_real_server(prefect_api: PrefectServer):
    store, mark = PrefectRecords(), uuid.uuid4().hex
    ended = record(f"{mark} ended", RecordPhase.ENDED, OLD)
    flying = record(f"{mark} flying", RecordPhase.STARTED, OLD)
    for one in (ended, flying):
        assert await store.claim(one)
        await store.add_waiter(one, str(uuid.uuid4()))
    counted = await prune(store, now=NOW, dry_run=True)
    assert counted.runs >= 1
    assert await store.attempts(ended.run_key)
    done = await prune(store, now=NOW)
    assert (done.runs, done.notes) == (counted.runs, counted.notes)
    assert await store.attempts(ended.run_key) == []
    assert len(await store.attempts(flying.run_key)) == 1
    notes = [name async for name in store.waiter_notes()]
    assert not any(name.startswith(store.notes_of(ended)) for name in notes)
    assert sum(name.startswith(store.notes_of(flying)) for name in notes) == 1
    assert (await prune(store, now=NOW)).runs == 0
