from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from prefect_crew.client.models import CrewStatus, TaskResult, TokenUsage
from prefect_crew.exceptions import InvalidCallError
from prefect_crew.states import CrewState

COMPLETED = CrewStatus(
    kickoff_id="k1",
    state=CrewState.COMPLETED,
    output="Lisbon",
    data={"city": "Lisbon"},
    tasks=[TaskResult(name="t1", output="a")],
    execution_time=2.5,
    usage=TokenUsage(total_tokens=3),
    raw={"state": "SUCCESS"},
)


def test_states_that_can_no_longer_change():
    assert {str(state) for state in CrewState if state.ended} == {"completed", "failed", "stopped"}


def test_a_completed_status_is_a_result():
    result = COMPLETED.result()
    shared = set(type(result).model_fields)
    assert result.model_dump() == {name: value for name, value in COMPLETED.model_dump().items() if name in shared}


@pytest.mark.parametrize("state", [state for state in CrewState if state is not CrewState.COMPLETED], ids=str)
def test_no_other_status_is(state: CrewState):
    with pytest.raises(InvalidCallError, match=f"k1 is {state}, not completed"):
        COMPLETED.model_copy(update={"state": state}).result()


def test_models_are_frozen_strict_picklable_and_quiet_about_raw():
    with pytest.raises(ValidationError):
        COMPLETED.state = CrewState.FAILED  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TaskResult.model_validate({"nmae": "t1"})
    assert pickle.loads(pickle.dumps(COMPLETED)) == COMPLETED
    assert "SUCCESS" not in repr(COMPLETED)
