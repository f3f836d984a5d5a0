"""What became of a row, and whether it is started again."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH, RetryRule, RowEnd, RowState, state_of
from prefect_crew.batches.rows import RowJob
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
    assert found.is_final == (state in ("completed", "failed", "stopped", "invalid-output"))
    assert found.is_failed == (state not in ("pending", "claimed", "started", "uncertain", "completed"))


def end(kind: str | None, state: str = "failed", *, found: bool = False, reason: str | None = None) -> RowEnd:
    ended = record(phase=RecordPhase.ENDED, reason=reason)
    return RowEnd(RowJob(0, 1, "k", {}, "d"), RowState(state), ended, "why", kind, found=found)


FAILED = end("CrewFailedError")


@pytest.mark.parametrize(
    ("rule", "ended", "count", "before", "again"),
    [
        pytest.param(RetryRule(), FAILED, 1, 0, False, id="off by default"),
        pytest.param(RetryRule(2), FAILED, 2, 0, True, id="second retry"),
        pytest.param(RetryRule(2), FAILED, 3, 0, False, id="no third"),
        pytest.param(RetryRule(9), FAILED, 3, 0, False, id="never beyond the crew's limit"),
        pytest.param(RetryRule(1), FAILED, 1, 1, True, id="one that an earlier call still owed"),
        pytest.param(RetryRule({"CrewFailedError": 1}), FAILED, 1, 0, True, id="by class"),
        pytest.param(RetryRule({"CrewStoppedError": 1}), FAILED, 1, 0, False, id="another class"),
        pytest.param(RetryRule(1), end("OutputTypeError", "invalid-output"), 1, 0, True, id="no fit"),
        pytest.param(RetryRule(1), end("CrewLostError", "lost"), 1, 0, False, id="lost is no number's business"),
        pytest.param(RetryRule({"CrewLostError": 1}), end("CrewLostError", "lost"), 1, 0, True, id="lost by class"),
        pytest.param(RetryRule(2), end("CrewTimeoutError", "timed-out"), 1, 0, False, id="timed out: it may run on"),
        pytest.param(RetryRule(2), end("KickoffUncertainError", "uncertain"), 1, 0, False, id="uncertain"),
        pytest.param(RetryRule(2), end("InvalidInputsError", "not-started"), 0, 0, False, id="refused"),
        pytest.param(RetryRule(0, True), FAILED, 1, 1, True, id="failed in an earlier call"),
        pytest.param(RetryRule(0, True), FAILED, 2, 1, False, id="once a call"),
        pytest.param(RetryRule(0, True), end("CrewLostError", "lost"), 1, 1, False, id="lost is not among all failed"),
        pytest.param(RetryRule(0, {"k"}), end("CrewLostError", "lost"), 1, 1, True, id="lost by its key"),
        pytest.param(RetryRule(0, {"other"}), FAILED, 1, 1, False, id="another key"),
        pytest.param(
            RetryRule(),
            end("CrewStoppedError", "stopped", found=True, reason=STOPPED_WITH_BATCH),
            1,
            1,
            True,
            id="stopped with the batch",
        ),
    ],
)
def test_when_a_row_is_started_again(rule: RetryRule, ended: RowEnd, count: int, before: int, again: bool):
    assert rule.applies_to(ended, count=count, before=before, most=3) is again
