"""What a process knows of the runs that it has opened, and how much of them it shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew.artifacts.markdown import render_run
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.models import CrewStatus, TaskResult
from prefect_crew.client.redaction import MASK
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import Crew
from prefect_crew.records.model import RunRecord
from prefect_crew.runs import run as run_module
from prefect_crew.runs.run import OpenRun, recall, remember, reopened
from prefect_crew.states import CrewState

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def crew(**fields: Any) -> Crew:
    return DeployedCrew(url="https://travel.test", token=SecretStr("the-token"), **fields).crew.called("travel")


def record() -> RunRecord:
    return RunRecord(
        idempotency_key="k", attempt=1, crew="travel", crew_url="https://travel.test", inputs_digest="d", owner="o",
        claimed_at=NOON, kickoff_id="r1", kicked_off_at=NOON,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    run_module._recent.clear()
    run_module._waited.clear()
    yield
    run_module._recent.clear()
    run_module._waited.clear()


# Memory


def test_a_run_is_recalled_once_and_looked_at_as_often_as_wanted():
    run = OpenRun(crew(), "r1")
    remember(run)
    assert recall(crew(), "r1", take=False) is run
    assert recall(crew(), "r1") is run
    assert recall(crew(), "r1") is None
    assert recall(crew(), "r2") is None


def test_another_crew_has_runs_of_its_own():
    remember(OpenRun(crew(), "r1"))
    other = DeployedCrew(url="https://other.test", token=SecretStr("t"))
    assert recall(other.crew, "r1") is None
    assert recall(crew(), "r1") is not None


def test_a_long_lived_process_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "_KEPT", 2)
    for name in ("r1", "r2", "r1", "r3"):
        remember(OpenRun(crew(), name))
    assert [recall(crew(), name) is not None for name in ("r1", "r2", "r3")] == [True, False, True]


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


def secretive(inputs: Any, **fields: Any) -> OpenRun:
    return OpenRun(crew(secret_inputs=["password"], **fields), "r1", record=record(), inputs=inputs)


def test_secrets_are_masked_in_every_text_of_a_status_and_the_raw_body_is_left_out():
    masked = secretive({"password": "hunter22"}).masked(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert masked.output == f"the output of {MASK}"
    assert masked.tasks[0].name == f"for {MASK}"
    assert (masked.state, masked.execution_time, masked.raw) == (CrewState.COMPLETED, 2.0, None)


def test_a_secret_that_is_also_a_word_of_the_api_breaks_nothing():
    run = OpenRun(crew(secret_inputs=["flag"]), "r1", inputs={"flag": "completed"})
    masked = run.masked(STATUS.model_copy(update={"output": "completed"}))
    assert (masked.state, masked.output) == (CrewState.COMPLETED, MASK)
    assert "✓ completed" in render_run(run.view(STATUS))


def test_where_the_secrets_are_not_known_no_text_is_shown():
    run = secretive(None)
    assert run.blind
    assert (run.show, run.told("hunter22 failed")) == ("summary", run_module.WITHHELD)
    masked = run.masked(STATUS)
    assert "hunter22" not in repr(masked) + masked.model_dump_json()
    assert "22 characters" in render_run(run.view(STATUS))
    failed = STATUS.model_copy(update={"state": CrewState.FAILED})
    shown = render_run(run.view(failed))
    assert "hunter22" not in shown
    assert "withheld" in shown


def test_nothing_is_withheld_where_nothing_is_secret():
    run = OpenRun(crew(), "r1")
    assert (run.blind, run.show) == (False, "full")
    assert run.told("the-token failed") == f"{MASK} failed"
    assert run.told(None) is None


def test_show_is_the_crews_own_choice_where_it_is_stricter():
    assert secretive(None, show="none").show == "none"


def test_a_secret_is_masked_in_the_other_inputs_as_well():
    run = secretive({"password": "hunter22", "url": "https://me:hunter22@x.test", "note": "the-token"})
    shown = render_run(run.view(None))
    assert "hunter22" not in shown
    assert "the-token" not in shown
    assert "https://me:" in shown


def test_a_view_has_what_the_record_knows():
    view = secretive({"password": "x"}, price=0.5).view(STATUS, notes=["A note."])
    assert (view.crew, view.kickoff_id, view.idempotency_key, view.state) == ("travel", "r1", "k", CrewState.COMPLETED)
    assert (view.started_at, view.price, view.notes) == (NOON, 0.5, ["A note."])
    assert OpenRun(crew(), "r1").view(None).state is CrewState.PENDING


def test_a_run_has_one_artifact():
    run = OpenRun(crew(), "r1")
    assert run.shown_by() is run.shown_by()


def test_a_second_wait_still_knows_what_no_record_has():
    webhooks = Webhooks(crew="https://hooks.test/mine")
    run = OpenRun(crew(), "r1", record(), {"pin": "4711"}, webhooks=webhooks)
    run.crew = run.crew.hiding(["pin"], texts=[SecretStr("hunter22")])
    remember(run)
    assert recall(crew(), "r1") is run
    again = reopened(crew(), "r1", record())
    assert again is not run
    assert (again.inputs, again.webhooks, again.owned) == ({"pin": "4711"}, webhooks, False)
    assert again.told("4711 and hunter22") == f"{MASK} and {MASK}"
    assert reopened(crew(), "r2", None).inputs is None


def test_whoever_does_not_know_the_inputs_shows_nothing_of_a_run_whose_record_says_that_some_are_secret():
    kept = record().model_copy(update={"secret_inputs": ["pin"]})
    run = OpenRun(crew(), "r1", kept)
    assert (run.blind, run.show) == (True, "summary")
    assert run.named("task-1") == "task-1"
    assert run.named("log in as 4711") == "(withheld)"


def test_a_new_token_is_a_secret_as_well_as_the_old_one():
    run = OpenRun(crew(), "r1", inputs={})
    assert run.redact("the-token, the-other-token") == f"{MASK}, the-other-token"
    run.renewed(replace(crew(), token=SecretStr("the-other-token")))
    assert run.redact("the-token, the-other-token") == f"{MASK}, {MASK}"


def test_the_repr_of_a_run_has_nothing_that_its_crew_or_its_caller_said():
    run = OpenRun(
        crew(), "r1", record(), {"text": "pass-1234"}, task_seen="pass-1234", meta={"a": "pass-1234"},
        webhooks=Webhooks(task="https://hooks.test/pass-1234"),
    )  # fmt: skip
    assert "'r1'" in repr(run)
    assert "pass-1234" not in repr(run)
