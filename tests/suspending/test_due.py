"""When a suspended flow run is needed again, and for how long Prefect lets it stay suspended."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.records import RecordPhase, RunRecord
from prefect_crew.reviews import asked_of
from prefect_crew.suspending.resuming import due
from prefect_crew.suspending.suspended import SuspendedWait
from prefect_crew.suspending.suspension import AT_MOST, MARGIN, _masked, checked_wait, polling_only, suspend_timeout
from prefect_crew.waiting import Phases, WaitPolicy

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SUSPEND = WaitPolicy(mode="suspend", timeout=3600, human_timeout=7200, grace=30)


def record(*, age: float = 60, **fields: Any) -> RunRecord:
    at = NOW - timedelta(seconds=age)
    known: dict[str, Any] = {"phase": RecordPhase.STARTED, "kickoff_id": "k", "kicked_off_at": at, **fields}
    return RunRecord(
        run_key="key",
        attempt=1,
        crew="travel",
        crew_url="http://127.0.0.1",
        inputs_digest="d",
        owner="o",
        claimed_at=at,
        known_by=at,
        **known,
    )


def wait(**fields: Any) -> SuspendedWait:
    return SuspendedWait(
        **{"flow_run_id": "f", "run_key": "key", "attempt": 1, "since": NOW, "policy": SUSPEND, **fields}
    )


def status(state: CrewState) -> CrewStatus:
    return CrewStatus(kickoff_id="k", state=state, human_task_id="draft", raw={"task_output": "to be judged"})


QUESTION = asked_of(status(CrewState.WAITING)) or ""
ASKED = {"asks": True, "asked": QUESTION, "answers": 1}


CASES = {
    "completed": (wait(), record(), CrewState.COMPLETED, True),
    "failed": (wait(), record(), CrewState.FAILED, True),
    "stopped": (wait(), record(), CrewState.STOPPED, True),
    "running": (wait(), record(), CrewState.RUNNING, False),
    "pending": (wait(), record(), CrewState.PENDING, False),
    "nobody could be asked": (wait(), record(), None, False),
    "waits for a person whom the flow can ask": (wait(asks=True), record(), CrewState.WAITING, True),
    "waits for a person whom the flow cannot ask": (wait(), record(), CrewState.WAITING, False),
    "not known yet": (wait(), record(age=20), CrewState.UNKNOWN, False),
    "lost": (wait(), record(age=40), CrewState.UNKNOWN, True),
    "over its time": (wait(), record(age=3601), CrewState.RUNNING, True),
    "within its time, people's taken off": (wait(), record(age=3700, human_seconds=200), CrewState.RUNNING, False),
    "people are over their time": (
        wait(),
        record(age=8000, human_since=NOW - timedelta(seconds=7201)),
        CrewState.WAITING,
        True,
    ),
    "people got more time": (
        wait(human_extra=7200),
        record(age=8000, human_since=NOW - timedelta(seconds=7201)),
        CrewState.WAITING,
        False,
    ),
    "its form asks that already": (wait(**ASKED), record(), CrewState.WAITING, False),
    "its form asks something else": (wait(**ASKED | {"asked": "another"}), record(), CrewState.WAITING, True),
    "its form asks an earlier round": (wait(**ASKED | {"answers": 0}), record(), CrewState.WAITING, True),
    "what its form asks was answered elsewhere": (wait(**ASKED), record(), CrewState.RUNNING, True),
    "ended with its form up": (wait(**ASKED), record(), CrewState.COMPLETED, True),
    "not known for a moment with its form up": (wait(**ASKED), record(age=20), CrewState.UNKNOWN, False),
    "people are over their time with a form": (
        wait(**ASKED),
        record(age=8000, human_since=NOW - timedelta(seconds=7201)),
        CrewState.WAITING,
        True,
    ),
    "closed by another waiter": (wait(), record(phase=RecordPhase.ENDED), None, True),
    "pruned": (wait(), None, None, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_flow_run_is_resumed_when_its_run_needs_it(case: tuple[SuspendedWait, RunRecord | None, Any, bool]):
    who, of, state, expected = case
    assert due(who, of, None if state is None else status(state), NOW, answers=1) is expected


def test_prefects_timeout_comes_after_all_budgets():
    now = NOW.timestamp()
    phases = Phases(kicked_off_at=now - 600)
    assert phases.most_left(SUSPEND, now) == pytest.approx(3000 + 7200)
    assert suspend_timeout([10.0, 3000 + 7200]) == 3000 + 7200 + MARGIN


@pytest.mark.parametrize("field", ["timeout", "human_timeout"])
def test_no_limit_is_said_to_prefect_in_numbers(field: str):
    policy = SUSPEND.model_copy(update={field: None})
    left = Phases(kicked_off_at=0.0).most_left(policy, 1.0)
    assert left is None
    assert suspend_timeout([5.0, left]) == AT_MOST


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ("********", True),
        (SecretStr("**********"), True),
        ({"crew": {"token": "********"}}, True),
        (["fine", "********"], True),
        ("*** three stars", False),
        (SecretStr("a-real-one"), False),
        ({"crew": "travel"}, False),
        (None, False),
    ],
)
def test_stars_in_parameters_are_secrets_that_prefect_did_not_keep(value: Any, masked: bool):
    assert _masked(value) is masked


def test_it_is_refused_outside_of_a_flow_unless_polling_is_allowed():
    with pytest.raises(ConfigurationError, match=r"outside of a flow run.*Nothing was started"):
        checked_wait(SUSPEND, "Crew travel")
    allowed = SUSPEND.model_copy(update={"suspend_fallback": "poll"})
    assert checked_wait(allowed, "Crew travel") == allowed.polling
    assert checked_wait(WaitPolicy(), "Crew travel") == WaitPolicy()


def test_what_holds_a_process_by_its_nature_never_suspends():
    with pytest.raises(ConfigurationError, match="A batch"):
        polling_only(SUSPEND, "A batch")
    assert polling_only(SUSPEND.model_copy(update={"suspend_fallback": "poll"}), "A batch").mode == "poll"
