"""What became of a row, and whether it is started again."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import RowState, state_of
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.states import CrewState


def record(**facts: Any) -> RunRecord:
    given: dict[str, Any] = {"idempotency_key": "batch/b/k", "attempt": 1, "crew": "c", "crew_url": "u"}
    given |= {"inputs_digest": "d", "owner": "o", "claimed_at": utcnow()}
    return RunRecord(**given | facts)


@pytest.mark.parametrize(
    ("phase", "facts", "state"),
    [
        ("claimed", {}, "claimed"),
        ("uncertain", {"reason": "cut off"}, "uncertain"),
        ("not-started", {"reason": "RateLimitedError"}, "pending"),
        ("not-started", {"error": "the input is refused"}, "not-started"),
        ("started", {}, "started"),
        ("started", {"error": "x", "reason": "CrewTimeoutError"}, "timed-out"),
        ("started", {"error": "x", "reason": "CrewLostError"}, "lost"),
        ("started", {"error": "x", "reason": "CrewConnectionError"}, "no-answer"),
        ("ended", {"state": CrewState.COMPLETED}, "completed"),
        ("ended", {"state": CrewState.COMPLETED, "error": "does not fit"}, "invalid-output"),
        ("ended", {"state": CrewState.FAILED, "error": "x"}, "failed"),
        ("ended", {"state": CrewState.STOPPED}, "stopped"),
        ("ended", {"state": CrewState.UNKNOWN}, "lost"),
    ],
)
def test_how_a_row_stands_by_its_record(phase: str, facts: dict[str, Any], state: str):
    found = state_of(record(phase=RecordPhase(phase), **facts))
    assert found == state
    assert found.is_final == (state in ("completed", "failed", "invalid-output"))
    assert found.is_failed == (state not in ("pending", "claimed", "started", "uncertain", "completed"))


@pytest.mark.parametrize(
    ("options", "state", "count", "before", "again"),
    [
        pytest.param({}, "failed", 1, 0, False, id="off by default"),
        pytest.param({"retries": 2}, "failed", 2, 0, True, id="second retry"),
        pytest.param({"retries": 2}, "failed", 3, 0, False, id="no third"),
        pytest.param({"retries": 9}, "failed", 3, 0, False, id="never beyond the crew's limit"),
        pytest.param({"retries": 1}, "failed", 1, 1, True, id="one that an earlier call still owed"),
        pytest.param({"retries": {"CrewFailedError": 1}}, "failed", 1, 0, True, id="by class"),
        pytest.param({"retries": {"CrewStoppedError": 1}}, "failed", 1, 0, False, id="another class"),
        pytest.param({"retries": 1}, "invalid-output", 1, 0, True, id="no fit"),
        pytest.param({"retries": 1}, "lost", 1, 0, False, id="lost, whatever the number"),
        pytest.param({"retries": {"CrewLostError": 1}}, "lost", 1, 0, True, id="lost by class"),
        pytest.param({"retries": 2}, "timed-out", 1, 0, False, id="timed out: it may run on"),
        pytest.param({"retries": 2}, "uncertain", 1, 0, False, id="uncertain"),
        pytest.param({"retries": 2}, "not-started", 0, 0, False, id="refused"),
        pytest.param({"retry_failed": True}, "failed", 1, 1, True, id="failed in an earlier call"),
        pytest.param({"retry_failed": True}, "failed", 2, 1, False, id="once a call"),
        pytest.param({"retry_failed": True}, "lost", 1, 1, False, id="lost is not among all failed"),
        pytest.param({"retry_failed": {"k"}}, "lost", 1, 1, True, id="lost by its key"),
        pytest.param({"retry_failed": {"other"}}, "failed", 1, 1, False, id="another key"),
    ],
)
def test_when_a_row_is_started_again(options: dict[str, Any], state: str, count: int, before: int, again: bool):
    given = BatchOptions(**options)
    assert given.starts_again(RowState(state), "k", count=count, before=before, most=3) is again


def test_a_row_that_was_stopped_with_its_batch_is_started_again_whatever_the_options_say():
    assert BatchOptions().starts_again(RowState.STOPPED, "k", count=1, before=1, most=3, owed=1)
