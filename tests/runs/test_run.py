"""One run as a process knows it: what may be shown of it, what a kickoff hands to its wait, and how it ends."""

import pickle
import re
from datetime import date
from typing import Any
from unittest.mock import AsyncMock

import pytest
from pydantic import BaseModel, SecretStr, field_validator

import prefect_crew as pc
from prefect_crew.artifacts.run import render_run
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, CrewStatus, TaskResult
from prefect_crew.client.redaction import MASK
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew
from prefect_crew.exceptions import StoreError
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.run import WITHHELD, LiveRun, parse_data, read_attempt, result_of
from prefect_crew.states import CrewState
from prefect_crew.store.decision import Attempt
from support.past import new_attempt


def crew(**fields: Any) -> Crew:
    return crew_of(DeployedCrew(url="https://travel.test", token=SecretStr("the-token"), **fields)).called("travel")


def attempt(*secret: str) -> Attempt:
    return new_attempt("k", kickoff_id="r1", secret_names=[*secret])


def asked(inputs: dict[str, Any], *secret: str, **options: Any) -> RunRequest:
    return RunRequest(crew(), Inputs.of(inputs).keep_secret(secret), RunOptions(**options))


def secretive(inputs: dict[str, Any] | None, **fields: Any) -> LiveRun:
    request = None if inputs is None else asked(inputs, "password")
    return LiveRun(crew(secret_inputs=["password"], **fields), "r1", attempt(), request)


SUMMARY = LiveRun(crew(show="summary"), "r1", request=asked({}))


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


def test_secrets_are_masked_in_every_text():
    run = secretive({"password": "hunter22", "url": "https://me:hunter22@x.test", "note": "the-token"})
    masked = run.redact_status(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert masked.output == f"the output of {MASK}"
    assert masked.tasks[0].name == f"for {MASK}"
    assert masked.state == CrewState.COMPLETED
    assert masked.execution_time == 2.0
    assert masked.raw is None
    shown = render_run(run.view(None))
    assert "hunter22" not in shown
    assert "the-token" not in shown
    assert "https://me:" in shown
    run = LiveRun(crew(), "r1", request=asked({"flag": "completed"}, "flag"))
    masked = run.redact_status(STATUS.model_copy(update={"output": "completed"}))
    assert masked.state == CrewState.COMPLETED
    assert masked.output == MASK
    assert "✓ completed" in render_run(run.view(STATUS))


@pytest.mark.parametrize(
    "run",
    [secretive(None), LiveRun(crew(), "r1", attempt("password"))],
    ids=["of the block", "of the attempt"],
)
def test_unknown_secrets_show_no_text(run: LiveRun):
    assert run.is_blind is True
    assert run.show == "summary"
    assert run.redact_text("hunter22 failed") == WITHHELD
    assert run.redact_name("task-1") == "task-1"
    assert run.redact_name("log in as hunter22") == "(withheld)"
    masked = run.redact_status(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert "22 characters" in render_run(run.view(STATUS))
    shown = render_run(run.view(STATUS.model_copy(update={"state": CrewState.FAILED})))
    assert "hunter22" not in shown
    assert "withheld" in shown


def test_a_reattached_call_does_not_know_the_secrets():
    started = attempt("pin")
    run = LiveRun(crew(), "r1", started, asked({"text": "a", "pin": "5678"}, "pin"), is_found=True)
    assert "1234" not in run.redact_text("log in with 1234")
    ours = LiveRun(run.crew, "r1", started, run.request, owned=True)
    assert ours.redact_text("log in with 1234") == "log in with 1234"
    plain = LiveRun(crew(), "r1", attempt(), asked({"text": "a"}), is_found=True)
    assert plain.redact_text("a text") == "a text"
    plain.attempt, plain.is_unread = None, True  # it may name secret inputs
    assert plain.redact_text("a text") == WITHHELD


def test_old_and_new_tokens_are_secret():
    run = LiveRun(crew(), "r1", request=asked({}))
    assert run.redact("the-token, the-other-token") == f"{MASK}, the-other-token"
    run.session.crew = run.crew.with_token(SecretStr("the-other-token"))
    assert run.redact("the-token, the-other-token") == f"{MASK}, {MASK}"


def test_repr_and_pickle_show_no_text():
    webhooks = Webhooks(task="https://hooks.test/pass-1234")
    request = asked({"text": "pass-1234"}, meta={"a": "pass-1234"}, webhooks=webhooks)
    run = LiveRun(crew(), "r1", attempt(), request)
    run.notify(CrewStatus(kickoff_id="r1", state=CrewState.RUNNING, current_task="pass-1234"))
    assert "'r1'" in repr(run)
    assert "pass-1234" not in repr(run)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(run)


async def test_an_unread_attempt_may_name_secrets(monkeypatch: pytest.MonkeyPatch):
    away = AsyncMock(side_effect=StoreError("away", operation="read", started="no"))
    monkeypatch.setattr("prefect_crew.runs.run.in_store", away)
    run, known = LiveRun(crew(), "r1"), LiveRun(crew(), "r1", attempt())
    assert run.redact_text("a text") == "a text"
    for one in (run, known):
        await read_attempt(one)
    assert run.redact_text("a text") == WITHHELD
    assert known.redact_text("a text") == "a text"


# Ends


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("failed", pc.CrewFailedError),
        ("stopped", pc.CrewStoppedError),
        ("unknown", pc.CrewLostError),
        ("running", pc.NoResultError),
    ],
)
def test_a_state_without_a_result_is_raised(state: str, kind: type[pc.CrewError]):
    with pytest.raises(kind, match="r1 of crew travel") as caught:
        result_of(secretive({"password": "hunter22"}), STATUS.model_copy(update={"state": CrewState(state)}))
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
        if city == "Babel":
            raise KeyError(city)
        return city


class Itinerary(BaseModel, strict=True):
    on: date
    stops: tuple[str, ...]


def result(output: str = "", data: Any = None) -> CrewResult:
    return CrewResult(output=output, data=data, kickoff_id="r1")


TRIP = Trip(city="Lisbon", days=3)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (result(output="ignored", data={"city": "Lisbon", "days": "3"}), TRIP),
        (result(output='{"city": "Lisbon", "days": 3}'), TRIP),
        (result(data={"on": "2026-05-01", "stops": ["Lisbon"]}), Itinerary(on=date(2026, 5, 1), stops=("Lisbon",))),
    ],
    ids=["data before text", "text", "strict"],
)
def test_data_becomes_a_model(raw: CrewResult, expected: BaseModel):
    parsed = parse_data(raw, type(expected))
    assert parsed.data == expected
    assert parsed.output == raw.output


SUNK = '{"city": "Atlantis", "days": 3}'
SECRET_CITY = '{"city": "hunter22"}'
SHOWN = LiveRun(crew(), "r1", request=asked({}))


@pytest.mark.parametrize(
    ("output", "run", "problems", "text"),
    [
        ('{"city": 3}', None, ["city: Input should be a valid string", "days: Field required"], '{"city": 3}'),
        (SUNK, SHOWN, ["city: Value error, Atlantis is not to be found"], SUNK),
        (SUNK, SUMMARY, ["city: value_error"], "not shown"),
        ('{"city": "Babel"}', SHOWN, ["Trip: KeyError: 'Babel'"], '{"city": "Babel"}'),
        ('{"city": "Babel"}', SUMMARY, ["Trip: KeyError"], "not shown"),
        (SECRET_CITY, secretive({"password": "hunter22"}), ["days: Field required"], f'{{"city": "{MASK}"}}'),
        ("Lisbon", SUMMARY, ["the text: json_invalid"], "not shown"),
    ],
)
def test_a_misfit_shows_what_may_be_shown(output: str, run: LiveRun | None, problems: list[str], text: str):
    with pytest.raises(pc.OutputTypeError, match=re.escape(f"The text: {text}.")) as caught:
        parse_data(result(output), Trip, run=run)
    assert caught.value.problems == problems
    assert caught.value.output == output, "the caller has it anyway"
    assert caught.value.kickoff_id == "r1"
    assert caught.value.__context__ is None, "its frames hold the whole result"
    assert pickle.loads(pickle.dumps(caught.value)).problems == problems
