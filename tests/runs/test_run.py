"""One run as a process knows it: what may be shown of it, what a kickoff hands to its wait, and how it ends."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from prefect.serializers import Serializer
from pydantic import BaseModel, SecretStr, field_validator, model_validator
from pydantic_core import from_json, to_json

from prefect_crew.artifacts.run import render_run
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, CrewStatus, TaskResult
from prefect_crew.client.redaction import MASK
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew
from prefect_crew.exceptions import (
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    NoResultError,
    OutputTypeError,
)
from prefect_crew.records.model import RunRecord
from prefect_crew.runs.run import WITHHELD, KickoffId, OpenRun, find_run, parse_data, result_of
from prefect_crew.states import CrewState

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def crew(**fields: Any) -> Crew:
    return DeployedCrew(url="https://travel.test", token=SecretStr("the-token"), **fields).crew.called("travel")


def record(**fields: Any) -> RunRecord:
    return RunRecord(
        idempotency_key="k", attempt=1, crew="travel", crew_url="https://travel.test", inputs_digest="d", owner="o",
        claimed_at=NOON, kickoff_id="r1", kicked_off_at=NOON, **fields,
    )  # fmt: skip


def of(inputs: dict[str, Any], *secret: str) -> Inputs:
    return Inputs.of(inputs).keep_secret(secret)


def secretive(inputs: dict[str, Any] | None, **fields: Any) -> OpenRun:
    known = None if inputs is None else of(inputs, "password")
    return OpenRun(crew(secret_inputs=["password"], **fields), "r1", record=record(), inputs=known)


# What may be shown


STATUS = CrewStatus(
    kickoff_id="r1",
    state=CrewState.COMPLETED,
    raw_state="SUCCESS",
    message="hunter22 said so",
    current_task="ask hunter22",
    last_step="hunter22",
    output="the output of hunter22",
    data={"hunter22": ["hunter22", 3]},
    error="hunter22 was refused",
    tasks=[TaskResult(name="for hunter22", agent="hunter22's", output="hunter22", data=["hunter22"], raw="hunter22")],
    raw={"everything": "hunter22"},
    execution_time=2.0,
)


def test_secrets_are_masked_in_every_text_of_a_status_and_of_the_inputs_and_words_of_the_api_stay():
    run = secretive({"password": "hunter22", "url": "https://me:hunter22@x.test", "note": "the-token"})
    masked = run.redact_status(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert masked.output == f"the output of {MASK}"
    assert masked.tasks[0].name == f"for {MASK}"
    assert (masked.state, masked.execution_time, masked.raw) == (CrewState.COMPLETED, 2.0, None)
    shown = render_run(run.view(None))
    assert "hunter22" not in shown
    assert "the-token" not in shown
    assert "https://me:" in shown
    run = OpenRun(crew(), "r1", inputs=of({"flag": "completed"}, "flag"))
    masked = run.redact_status(STATUS.model_copy(update={"output": "completed"}))
    assert (masked.state, masked.output) == (CrewState.COMPLETED, MASK)
    assert "✓ completed" in render_run(run.view(STATUS))


@pytest.mark.parametrize(
    "run",
    [secretive(None), OpenRun(crew(), "r1", record(secret_inputs=["password"]))],
    ids=["of the block", "of the record"],
)
def test_where_the_secrets_are_not_known_no_text_is_shown(run: OpenRun):
    assert (run.is_blind, run.show, run.redact_text("hunter22 failed")) == (True, "summary", WITHHELD)
    assert (run.redact_name("task-1"), run.redact_name("log in as hunter22")) == ("task-1", "(withheld)")
    masked = run.redact_status(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert "22 characters" in render_run(run.view(STATUS))
    shown = render_run(run.view(STATUS.model_copy(update={"state": CrewState.FAILED})))
    assert "hunter22" not in shown
    assert "withheld" in shown


def test_a_call_that_finds_a_run_does_not_know_the_secrets_that_it_was_started_with():
    started = record().model_copy(update={"secret_inputs": ["pin"]})
    run = OpenRun(crew(), "r1", started, of({"text": "a", "pin": "5678"}, "pin"), is_found=True)
    assert "1234" not in run.redact_text("log in with 1234")
    ours = OpenRun(run.crew, "r1", started, run.inputs, owned=True)
    assert ours.redact_text("log in with 1234") == "log in with 1234"
    assert OpenRun(crew(), "r1", record(), of({"text": "a"}), is_found=True).redact_text("a text") == "a text"


def test_a_new_token_is_a_secret_as_well_as_the_old_one():
    run = OpenRun(crew(), "r1", inputs=of({}))
    assert run.redact("the-token, the-other-token") == f"{MASK}, the-other-token"
    run.use_token_of(replace(crew(), token=SecretStr("the-other-token")))
    assert run.redact("the-token, the-other-token") == f"{MASK}, {MASK}"


def test_the_repr_of_a_run_has_nothing_that_its_crew_or_its_caller_said():
    run = OpenRun(
        crew(), "r1", record(), of({"text": "pass-1234"}), task_seen="pass-1234", meta={"a": "pass-1234"},
        webhooks=Webhooks(task="https://hooks.test/pass-1234"),
    )  # fmt: skip
    assert "'r1'" in repr(run)
    assert "pass-1234" not in repr(run)


# From the kickoff to the wait


@pytest.mark.usefixtures("prefect_api")
async def test_a_kickoff_id_hands_its_run_to_the_first_wait_and_what_no_record_has_to_all():
    webhooks = Webhooks(crew="https://hooks.test/mine")
    inputs = of({"pin": "4711"}, "pin").keep_secret([], [SecretStr("hunter22")])
    run = OpenRun(crew(), "r1", record(), inputs, owned=True, webhooks=webhooks)
    kickoff_id = KickoffId(run)
    looked_at = await find_run(crew(), kickoff_id)
    assert await find_run(crew(), kickoff_id, to_wait=True) is run
    for again in (looked_at, await find_run(crew(), kickoff_id, to_wait=True)):
        assert again is not run
        assert (again.kickoff_id, again.inputs, again.webhooks, again.owned) == ("r1", inputs, webhooks, False)
        assert again.redact_text("4711 and hunter22") == f"{MASK} and {MASK}"
    other = replace(crew(), url="https://other.test")
    assert (await find_run(other, KickoffId(run), to_wait=True)).inputs is None


@pytest.mark.parametrize(
    ("write", "read"),
    [
        pytest.param(json.dumps, json.loads, id="json"),
        pytest.param(orjson.dumps, orjson.loads, id="orjson"),
        pytest.param(to_json, from_json, id="pydantic"),
        pytest.param(pickle.dumps, pickle.loads, id="pickle"),
        pytest.param(copy.copy, copy.copy, id="copy"),
        pytest.param(copy.deepcopy, copy.deepcopy, id="deepcopy"),
        *(
            pytest.param(Serializer(type=kind).dumps, Serializer(type=kind).loads, id=f"prefect-{kind}")
            for kind in ("json", "pickle", "compressed/json", "compressed/pickle")
        ),
    ],
)
def test_a_kickoff_id_that_is_stored_or_sent_elsewhere_is_plain_text(write: Any, read: Any):
    kickoff_id = KickoffId(OpenRun(crew(), "r1", inputs=of({"pin": "4711"})))
    assert (kickoff_id, repr(kickoff_id), f"{kickoff_id}") == ("r1", "'r1'", "r1")
    stored = write(kickoff_id)
    assert "4711" not in str(stored)
    assert (read(stored), type(read(stored))) == ("r1", str)


# Ends


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("failed", CrewFailedError),
        ("stopped", CrewStoppedError),
        ("unknown", CrewLostError),
        ("running", NoResultError),
    ],
)
def test_any_other_state_is_raised_and_never_returned(state: str, kind: type[CrewError]):
    run = secretive({"password": "hunter22"})
    with pytest.raises(kind, match="r1 of crew travel") as caught:
        result_of(run, STATUS.model_copy(update={"state": CrewState(state)}))
    assert type(caught.value) is kind
    assert "output of" not in str(caught.value)
    assert "hunter22" not in str(caught.value)


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
    assert parse_data(given, Trip).data == Trip(city="Lisbon", days=3)
    assert parse_data(given, Trip).output == given.output


class FromReport(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _of_report(cls, data: Any) -> Any:
        return data["report"]


def test_a_validator_that_raises_whatever_it_likes_is_a_misfit():
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"other": 1}'), FromReport)
    assert caught.value.problems == ["FromReport: KeyError: 'report'"]
    assert caught.value.__context__ is None, "its frames hold the whole result"
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"other": 1}'), FromReport, run=OpenRun(crew(show="summary"), "r1", inputs=of({})))
    assert caught.value.problems == ["FromReport: KeyError"]


def test_what_does_not_fit_is_shown_with_the_text():
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"city": 3}'), Trip)
    error = caught.value
    assert error.problems == ["city: Input should be a valid string", "days: Field required"]
    assert (error.output, error.kickoff_id) == ('{"city": 3}', "r1")
    assert 'The text: {"city": 3}.' in str(error)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    with pytest.raises(OutputTypeError, match="the text: Invalid JSON"):
        parse_data(result("Lisbon, three days"), Trip)


def test_a_message_shows_no_more_of_an_output_than_may_be_shown():
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"city": "hunter22"}'), Trip, run=secretive({"password": "hunter22"}))
    assert f'The text: {{"city": "{MASK}"}}' in str(caught.value)
    assert caught.value.output == '{"city": "hunter22"}', "the caller has it anyway"
    with pytest.raises(OutputTypeError) as caught:
        parse_data(
            result('{"city": "Atlantis", "days": 3}'), Trip, run=OpenRun(crew(show="summary"), "r1", inputs=of({}))
        )
    assert "Atlantis" not in str(caught.value)
    assert "city: value_error" in str(caught.value)
    with pytest.raises(OutputTypeError, match="Atlantis is not to be found"):
        parse_data(result('{"city": "Atlantis", "days": 3}'), Trip, run=OpenRun(crew(), "r1", inputs=of({})))
