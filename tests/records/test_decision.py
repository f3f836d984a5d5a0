"""What a call does about a key: pure, so every row of the table is a test."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_crew.exceptions import IdempotencyConflictError
from prefect_crew.records.decision import Caller, Decision, check_same_run, decide, latest_start
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.states import CrewState
from support.records import CLAIMED, ENDED, NOT_STARTED, STARTED, UNCERTAIN, new_record

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ME = Caller(owner="me", flow_run_id="flow-1", flow_run_count=2)


def record(phase: RecordPhase = CLAIMED, **fields: Any) -> RunRecord:
    known = {"inputs_digest": "d1", "claimed_at": NOON - MINUTE, "open_for": 60.0}
    return new_record("k", phase=phase, **known | fields)


def ended(state: CrewState, **fields: Any) -> RunRecord:
    return record(ENDED, **{"state": state, "kickoff_id": "r1", "ended_at": NOON - MINUTE, **fields})


LAST_ATTEMPT = {"flow_run_id": "flow-1", "flow_run_count": 1}
THIS_ATTEMPT = {"flow_run_id": "flow-1", "flow_run_count": 2}
ANOTHER_RUN = {"flow_run_id": "flow-2", "flow_run_count": 1}
BEFORE_THE_END = {"asked_at": NOON - 2 * MINUTE}
FAILED = ended(CrewState.FAILED)
FAILED_BEFORE = ended(CrewState.FAILED, **LAST_ATTEMPT)
IN_FLIGHT = record(STARTED, kickoff_id="r1")


def decided(existing: RunRecord | None, **options: Any) -> Decision:
    return decide(existing, **{"caller": ME, "kickoffs": 1, **options})


@pytest.mark.parametrize(
    ("existing", "options", "decision"),
    [
        pytest.param(None, {}, Decision.START, id="nothing there"),
        pytest.param(record(NOT_STARTED), {}, Decision.START, id="surely not started"),
        pytest.param(IN_FLIGHT, {}, Decision.REATTACH, id="in flight"),
        pytest.param(ended(CrewState.COMPLETED), {}, Decision.RETURN, id="completed"),
        pytest.param(ended(CrewState.COMPLETED), {"kickoffs": 99}, Decision.RETURN, id="completed at last"),
        pytest.param(FAILED, {}, Decision.START_AGAIN, id="failed once"),
        pytest.param(ended(CrewState.STOPPED), {}, Decision.START_AGAIN, id="stopped"),
        pytest.param(FAILED, {"kickoffs": 2}, Decision.START_AGAIN, id="failed twice"),
        pytest.param(FAILED, {"kickoffs": 3}, Decision.RETURN, id="failed as often as allowed"),
        pytest.param(FAILED, {"kickoffs": 1, "max_attempts": 1}, Decision.RETURN, id="may fail once"),
        pytest.param(FAILED, BEFORE_THE_END, Decision.RETURN, id="failed since the call, which waited for it"),
        pytest.param(FAILED, {"asked_at": NOON}, Decision.START_AGAIN, id="had failed before the call"),
        pytest.param(FAILED_BEFORE, BEFORE_THE_END, Decision.START_AGAIN, id="failed before, by a clock that is ahead"),
        pytest.param(record(UNCERTAIN), {}, Decision.UNCERTAIN, id="uncertain"),
        pytest.param(record(), {}, Decision.CLAIMED_ELSEWHERE, id="claimed by another, who has time"),
        pytest.param(record(open_for=0.0), {}, Decision.VOID, id="claimed by another, whose time is up"),
        pytest.param(record(), {"owner_ended": True}, Decision.VOID, id="claimed by a flow run that has ended"),
        pytest.param(record(**LAST_ATTEMPT), {}, Decision.VOID, id="claimed by our own last attempt"),
        pytest.param(record(**THIS_ATTEMPT), {}, Decision.CLAIMED_ELSEWHERE, id="claimed by a call of this attempt"),
        pytest.param(record(**ANOTHER_RUN), {}, Decision.CLAIMED_ELSEWHERE, id="claimed by another flow run"),
        pytest.param(record(), {"is_own": True}, Decision.VOID, id="claimed by an earlier try of this call"),
        pytest.param(record(entries=1), {"is_own": True}, Decision.VOID, id="an earlier try has a permit, unused"),
        pytest.param(record(entries=1), {}, Decision.CLAIMED_ELSEWHERE, id="sent by another, who has time"),
        pytest.param(record(entries=1, open_for=0.0), {}, Decision.UNCERTAIN, id="sent by another, whose time is up"),
        pytest.param(record(entries=1), {"owner_ended": True}, Decision.UNCERTAIN, id="sent by a flow run that ended"),
        pytest.param(record(entries=1, **LAST_ATTEMPT), {}, Decision.UNCERTAIN, id="sent by our own last attempt"),
    ],
)
def test_the_decision(existing: RunRecord | None, options: dict[str, Any], decision: Decision):
    assert decided(existing, **options) is decision


def test_an_unstarted_attempt_hides_no_run():
    completed, refused = ended(CrewState.COMPLETED), record(NOT_STARTED, attempt=2)
    assert latest_start([completed, refused]) is completed
    assert latest_start([refused]) is None
    assert latest_start([]) is None


@pytest.mark.parametrize(
    ("url", "digest", "says"),
    [
        pytest.param("https://other.test", "d1", r"travel at https://travel.test, not https://other.test", id="crew"),
        pytest.param("https://travel.test", "d2", r"digest is d1, now it is d2", id="inputs"),
    ],
)
def test_a_key_has_one_crew_and_one_input_set(url: str, digest: str, says: str):
    with pytest.raises(IdempotencyConflictError, match=says) as caught:
        check_same_run(IN_FLIGHT, crew_url=url, inputs_digest=digest)
    assert caught.value.idempotency_key == "k"
    assert caught.value.kickoff_id == "r1"


def test_refused_inputs_may_be_corrected():
    check_same_run(record(NOT_STARTED), crew_url="https://travel.test", inputs_digest="d2")
    check_same_run(IN_FLIGHT, crew_url="https://travel.test", inputs_digest="d1")
