"""What a caller gets for a run's last status."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, field_validator

from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import CrewError, CrewFailedError, CrewLostError, CrewStoppedError, OutputTypeError
from prefect_crew.runs.run import OpenRun, failure, result_of, typed
from prefect_crew.states import CrewState


def run(inputs: Any = None, **fields: Any) -> OpenRun:
    crew = DeployedCrew(url="https://travel.test", token=SecretStr("the-token"), **fields)
    return OpenRun(crew.crew.called("travel"), "r1", inputs=inputs)


def status(state: CrewState, **fields: Any) -> CrewStatus:
    return CrewStatus(kickoff_id="r1", state=state, **fields)


def test_only_a_completed_run_is_a_result():
    result = result_of(run(), status(CrewState.COMPLETED, output="Lisbon", raw={"x": 1}))
    assert (result.output, result.raw, result.kickoff_id) == ("Lisbon", {"x": 1}, "r1")


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (CrewState.FAILED, CrewFailedError),
        (CrewState.STOPPED, CrewStoppedError),
        (CrewState.UNKNOWN, CrewLostError),
        (CrewState.PENDING, CrewError),
        (CrewState.RUNNING, CrewError),
        (CrewState.WAITING, CrewError),
    ],
    ids=str,
)
def test_any_other_state_is_raised_and_never_returned(state: CrewState, kind: type[CrewError]):
    with pytest.raises(kind, match="r1 of crew travel") as caught:
        result_of(run(), status(state, output="looks like a result", error="no search engine"))
    assert type(caught.value) is kind
    assert "looks like a result" not in str(caught.value)


def test_a_run_that_goes_on_is_said_to_have_no_result_yet():
    with pytest.raises(CrewError, match=r"has no result yet: it is running\. Wait for it with wait_for_crew"):
        result_of(run(), status(CrewState.RUNNING))


def test_a_failure_holds_the_crews_own_error_and_what_to_do():
    error = failure(run(), CrewState.FAILED, "no search engine")
    assert isinstance(error, CrewFailedError)
    assert error.error == "no search engine"
    assert "Correct the crew, then start another run." in str(error)


def test_advice_takes_the_place_of_the_usual():
    advised = run()
    advised.advice = "Not again."
    assert str(failure(advised, CrewState.FAILED, None)).endswith("failed: the crew gave no reason. Not again.")
    assert str(failure(advised, CrewState.STOPPED, None)).endswith("Not again.")


def test_secrets_are_masked_in_a_crews_error():
    secretive = run({"password": "hunter22"}, secret_inputs=["password"])
    with pytest.raises(CrewFailedError) as caught:
        result_of(secretive, status(CrewState.FAILED, error="hunter22 is wrong; sent the-token"))
    assert caught.value.error == f"{MASK} is wrong; sent {MASK}"


def test_a_crews_error_is_withheld_where_its_secrets_are_not_known():
    with pytest.raises(CrewFailedError) as caught:
        result_of(run(secret_inputs=["password"]), status(CrewState.FAILED, error="hunter22 is wrong"))
    assert "hunter22" not in str(caught.value)
    assert "withheld" in str(caught.value)


# Types


class Trip(BaseModel):
    city: str
    days: int

    @field_validator("city")
    @classmethod
    def _not_atlantis(cls, city: str) -> str:
        if city == "Atlantis":
            raise ValueError(f"{city} is not to be found")
        return city


def result(output: str = "", data: Any = None) -> CrewResult:
    return CrewResult(output=output, data=data, kickoff_id="r1")


@pytest.mark.parametrize(
    "given",
    [
        result(data={"city": "Lisbon", "days": "3"}),
        result(output="ignored", data={"city": "Lisbon", "days": 3}),
        result(output='{"city": "Lisbon", "days": 3}'),
    ],
    ids=["data", "data before text", "text"],
)
def test_data_becomes_a_model(given: CrewResult):
    assert typed(given, Trip).data == Trip(city="Lisbon", days=3)
    assert typed(given, Trip).output == given.output


def test_what_does_not_fit_is_shown_beside_the_text():
    with pytest.raises(OutputTypeError) as caught:
        typed(result('{"city": 3}'), Trip)
    error = caught.value
    assert error.problems == ["city: Input should be a valid string", "days: Field required"]
    assert (error.output, error.kickoff_id) == ('{"city": 3}', "r1")
    assert 'The text: {"city": 3}.' in str(error)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_text_that_is_no_json_is_a_problem_of_the_text():
    with pytest.raises(OutputTypeError, match="the text: Invalid JSON"):
        typed(result("Lisbon, three days"), Trip)


def test_a_message_shows_no_more_of_an_output_than_may_be_shown():
    secretive = run({"password": "hunter22"}, secret_inputs=["password"])
    with pytest.raises(OutputTypeError) as caught:
        typed(result('{"city": "hunter22"}'), Trip, run=secretive)
    assert f'The text: {{"city": "{MASK}"}}' in str(caught.value)
    assert caught.value.output == '{"city": "hunter22"}', "the caller has it anyway"
    with pytest.raises(OutputTypeError) as caught:
        typed(result('{"city": "Atlantis", "days": 3}'), Trip, run=run({}, show="summary"))
    assert "Atlantis" not in str(caught.value)
    assert "city: value_error" in str(caught.value)
    with pytest.raises(OutputTypeError, match="Atlantis is not to be found"):
        typed(result('{"city": "Atlantis", "days": 3}'), Trip, run=run({}))
