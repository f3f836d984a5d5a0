"""One run as a process knows it: what may be shown of it, what a kickoff hands to its wait, and how it ends."""

from __future__ import annotations

import copy
import json
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from prefect.serializers import Serializer
from pydantic import BaseModel, SecretStr, field_validator
from pydantic_core import from_json, to_json

from prefect_crew import CrewStep, PipelineFailedError, arun_crew, arun_pipeline
from prefect_crew.artifacts.run import render_run
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.models import CrewResult, CrewStatus, TaskResult
from prefect_crew.client.redaction import MASK
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew
from prefect_crew.exceptions import CrewError, CrewFailedError, CrewLostError, CrewStoppedError, OutputTypeError
from prefect_crew.records.model import RunRecord
from prefect_crew.runs.run import WITHHELD, KickoffId, OpenRun, find_run, parse_data, result_of
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.scripts import FAILS
from support.seen import Seen

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def crew(**fields: Any) -> Crew:
    return DeployedCrew(url="https://travel.test", token=SecretStr("the-token"), **fields).crew.called("travel")


def record(**fields: Any) -> RunRecord:
    return RunRecord(
        idempotency_key="k", attempt=1, crew="travel", crew_url="https://travel.test", inputs_digest="d", owner="o",
        claimed_at=NOON, kickoff_id="r1", kicked_off_at=NOON, **fields,
    )  # fmt: skip


def secretive(inputs: Any, **fields: Any) -> OpenRun:
    return OpenRun(crew(secret_inputs=["password"], **fields), "r1", record=record(), inputs=inputs)


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


def test_secrets_are_masked_in_every_text_of_a_status_and_the_raw_body_is_left_out():
    masked = secretive({"password": "hunter22"}).redact_status(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert masked.output == f"the output of {MASK}"
    assert masked.tasks[0].name == f"for {MASK}"
    assert (masked.state, masked.execution_time, masked.raw) == (CrewState.COMPLETED, 2.0, None)


def test_a_secret_that_is_also_a_word_of_the_api_breaks_nothing():
    run = OpenRun(crew(secret_inputs=["flag"]), "r1", inputs={"flag": "completed"})
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


def test_a_secret_is_masked_in_the_other_inputs_as_well():
    run = secretive({"password": "hunter22", "url": "https://me:hunter22@x.test", "note": "the-token"})
    shown = render_run(run.view(None))
    assert "hunter22" not in shown
    assert "the-token" not in shown
    assert "https://me:" in shown


def test_a_new_token_is_a_secret_as_well_as_the_old_one():
    run = OpenRun(crew(), "r1", inputs={})
    assert run.redact("the-token, the-other-token") == f"{MASK}, the-other-token"
    run.use_token_of(replace(crew(), token=SecretStr("the-other-token")))
    assert run.redact("the-token, the-other-token") == f"{MASK}, {MASK}"


def test_the_repr_of_a_run_has_nothing_that_its_crew_or_its_caller_said():
    run = OpenRun(
        crew(), "r1", record(), {"text": "pass-1234"}, task_seen="pass-1234", meta={"a": "pass-1234"},
        webhooks=Webhooks(task="https://hooks.test/pass-1234"),
    )  # fmt: skip
    assert "'r1'" in repr(run)
    assert "pass-1234" not in repr(run)


# From the kickoff to the wait


@pytest.mark.usefixtures("prefect_api")
async def test_a_kickoff_id_hands_its_run_to_the_first_wait_and_what_no_record_has_to_all():
    webhooks = Webhooks(crew="https://hooks.test/mine")
    run = OpenRun(crew(), "r1", record(), {"pin": "4711"}, owned=True, webhooks=webhooks)
    run.crew = run.crew.hiding(["pin"], texts=[SecretStr("hunter22")])
    kickoff_id = KickoffId(run)
    looked_at = await find_run(crew(), kickoff_id)
    assert await find_run(crew(), kickoff_id, to_wait=True) is run
    for again in (looked_at, await find_run(crew(), kickoff_id, to_wait=True)):
        assert again is not run
        assert (again.kickoff_id, again.inputs, again.webhooks, again.owned) == ("r1", {"pin": "4711"}, webhooks, False)
        assert again.redact_text("4711 and hunter22") == f"{MASK} and {MASK}"
    other = replace(crew(), url="https://other.test")
    assert (await find_run(other, KickoffId(run), to_wait=True)).inputs is None


def test_a_kickoff_id_that_is_stored_or_sent_elsewhere_is_plain_text():
    kickoff_id = KickoffId(OpenRun(crew(), "r1", inputs={"pin": "4711"}))
    assert (kickoff_id, repr(kickoff_id), f"{kickoff_id}") == ("r1", "'r1'", "r1")
    assert b"4711" not in pickle.dumps(kickoff_id)
    for one in (pickle.loads(pickle.dumps(kickoff_id)), copy.deepcopy(kickoff_id), copy.copy(kickoff_id)):
        assert type(one) is str


@pytest.mark.parametrize(
    ("write", "read"),
    [
        pytest.param(json.dumps, json.loads, id="json"),
        pytest.param(orjson.dumps, orjson.loads, id="orjson"),
        pytest.param(to_json, from_json, id="pydantic"),
        *(
            pytest.param(Serializer(type=kind).dumps, Serializer(type=kind).loads, id=f"prefect-{kind}")
            for kind in ("json", "pickle", "compressed/json", "compressed/pickle")
        ),
    ],
)
def test_whatever_stores_a_kickoff_id_stores_plain_text(write: Any, read: Any):
    kickoff_id = KickoffId(OpenRun(crew(), "r1", inputs={"pin": "4711"}))
    stored = write({"run": kickoff_id})
    assert "4711" not in str(stored)
    assert (read(stored), type(read(stored)["run"])) == ({"run": "r1"}, str)


# Ends


def run(inputs: Any = None, **fields: Any) -> OpenRun:
    return OpenRun(crew(**fields), "r1", inputs=inputs)


def status(state: CrewState, **fields: Any) -> CrewStatus:
    return CrewStatus(kickoff_id="r1", state=state, **fields)


@pytest.mark.parametrize(
    ("state", "kind", "says"),
    [
        (CrewState.FAILED, CrewFailedError, "no search engine. Correct the crew, then start another run."),
        (CrewState.STOPPED, CrewStoppedError, "Correct the crew, then start another run."),
        (CrewState.UNKNOWN, CrewLostError, "is not known to the server"),
        (CrewState.RUNNING, CrewError, "has no result yet: it is running. Wait for it with wait_for_crew."),
        (CrewState.WAITING, CrewError, "has no result yet: it is waiting. Wait for it with wait_for_crew."),
    ],
    ids=str,
)
def test_any_other_state_is_raised_and_never_returned(state: CrewState, kind: type[CrewError], says: str):
    with pytest.raises(kind, match="r1 of crew travel") as caught:
        result_of(run(), status(state, output="looks like a result", error="no search engine"))
    assert type(caught.value) is kind
    assert "looks like a result" not in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "error"), [({"password": "hunter22"}, f"{MASK} is wrong; sent {MASK}"), (None, WITHHELD)]
)
def test_secrets_do_not_show_in_a_crews_error(inputs: Any, error: str):
    with pytest.raises(CrewFailedError) as caught:
        result_of(
            run(inputs, secret_inputs=["password"]),
            status(CrewState.FAILED, error="hunter22 is wrong; sent the-token"),
        )
    assert caught.value.error == error
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
    hiding = run({"password": "hunter22"}, secret_inputs=["password"])
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"city": "hunter22"}'), Trip, run=hiding)
    assert f'The text: {{"city": "{MASK}"}}' in str(caught.value)
    assert caught.value.output == '{"city": "hunter22"}', "the caller has it anyway"
    with pytest.raises(OutputTypeError) as caught:
        parse_data(result('{"city": "Atlantis", "days": 3}'), Trip, run=run({}, show="summary"))
    assert "Atlantis" not in str(caught.value)
    assert "city: value_error" in str(caught.value)
    with pytest.raises(OutputTypeError, match="Atlantis is not to be found"):
        parse_data(result('{"city": "Atlantis", "days": 3}'), Trip, run=run({}))


# What is said of a failed run is true where it is said


@pytest.mark.usefixtures("prefect_api", "instant_polling")
async def test_at_the_limit_it_names_what_can_be_done_in_each_place(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(FAILS), str(uuid.uuid4())
    crew = server.crew(max_kickoffs=1).crew.called("travel")
    last, none = [
        (await failed_text(lambda: arun_crew(crew, idempotency_key=idempotency_key))),
        (await failed_text(lambda: arun_crew(crew, idempotency_key=idempotency_key))),
    ]
    assert "This was attempt 1 of at most 1" in last
    assert "starts the crew again" not in last
    assert "Nothing was started: crew travel allows 1 kickoffs for one idempotency key (max_kickoffs)" in none
    for text in (last, none):
        for place in ("block deployed-crew/travel", "parameter force_new", "force_new=True", "--force-new"):
            assert place in text
    assert server.kickoffs == 1


async def failed_text(call: Callable[[], Any]) -> str:
    with pytest.raises(CrewFailedError) as raised:
        await call()
    return str(raised.value)


@pytest.mark.usefixtures("instant_polling")
async def test_artifacts_of_failures_say_first_why_and_what_to_do(crew_server: CrewServerFactory, seen: Seen):
    name = f"failing-{uuid.uuid4().hex[:8]}"
    crew = crew_server(FAILS).crew().crew.called(name)
    idempotency_key = str(uuid.uuid4())
    for _ in range(2):
        with pytest.raises(PipelineFailedError):
            await arun_pipeline(
                [CrewStep("write", crew), CrewStep("post", crew, after="write")],
                name=name,
                idempotency_key=idempotency_key,
            )
    text = " ".join(seen.artifacts(f"pipeline-{name}")[-1]["data"].split())  # its long lines are broken
    assert text.index("Step write failed (attempt 2 of at most 3)") < text.index("the search engine is down")
    again = "A retry of what called it, or a call with the same key, starts the crew again."
    assert text.index("the search engine is down") < text.index(again) < text.index("### Steps")
    own = " ".join(seen.artifacts(f"crew-{name}")[-1]["data"].split())
    assert own.index("### Error") < own.index("the search engine is down") < own.index(again)
    assert own.index(again) < own.index("Kicked off")
    assert "2 of at most 3" in own
