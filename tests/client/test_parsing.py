"""What parts of answers say on their own; whole bodies are those of the corpus."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefect_crew.client import _parsing
from prefect_crew.client._parsing import parse_kickoff, parse_status, parse_webhook, waiting_output
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.states import CrewState

LAST = {"task_id": "draft", "name": "Draft it", "output": "Draft v1"}


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        pytest.param({"human_input": {"task_output": "A"}, "last_executed_task": LAST}, "A", id="what-is-asked-first"),
        pytest.param({"current_task": "draft", "last_executed_task": LAST}, "Draft v1", id="the-last-task-by-its-id"),
        pytest.param({"current_task": "Draft it", "last_executed_task": LAST}, "Draft v1", id="by-its-name"),
        pytest.param({"current_task": {"task_id": "draft"}, "last_executed_task": LAST}, "Draft v1", id="an-object"),
        pytest.param({"last_executed_task": LAST}, "Draft v1", id="no-task-is-named"),
        pytest.param({"current_task": "review", "last_executed_task": LAST}, None, id="of-another-task"),
        pytest.param({"human_task_id": "review", "last_executed_task": LAST}, None, id="another-task-waits"),
        pytest.param({"current_task": "draft", "last_executed_task": "draft"}, None, id="a-name-alone"),
        pytest.param({"current_task": "draft"}, None, id="nothing"),
    ],
)
def test_what_a_person_is_to_judge(body: dict[str, Any], shown: str | None):
    assert waiting_output({"state": "PENDING_HUMAN_INPUT", **body}) == shown


@pytest.mark.parametrize("nested", [False, True], ids=["as-it-is", "as-text"])
def test_a_body_of_very_many_lists_is_not_taken_into_memory(nested: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_parsing, "MAX_CONTAINERS", 1_000)
    lists = [[] for _ in range(1_000)]
    body = json.dumps({"state": "SUCCESS", "result": json.dumps(lists) if nested else lists})
    with pytest.raises(ResponseFormatError):
        parse_status(body, "k")
    assert parse_status(body.replace("[], ", "", 10), "k").state is CrewState.COMPLETED


@pytest.mark.parametrize(
    ("body", "state", "error"),
    [
        pytest.param({"state": "SUCCESS", "status": "FAILED", "error": "boom"}, "failed", "boom", id="two-words"),
        pytest.param({"state": "SUCCESS", "status": "FAILED", "result": "boom"}, "failed", "boom", id="with-a-text"),
        pytest.param({"state": "SUCCESS", "status": "stopped"}, "stopped", None, id="stopped"),
        pytest.param({"state": "completed", "error": "Traceback: x"}, "failed", "Traceback: x", id="no-result"),
        pytest.param({"status": "completed", "error_message": "x", "result": None}, "failed", "x", id="null"),
        pytest.param({"status": "completed", "error": "x", "result": ""}, "failed", "x", id="empty"),
        pytest.param(
            {"state": "completed", "error": "x", "last_executed_task": {"output": "draft"}}, "failed", "x", id="a-task"
        ),
        pytest.param({"status": "success", "result": {"error": "boom"}}, "failed", "boom", id="the-result-is-one"),
        pytest.param(
            {"status": "success", "message": "Done.", "result": {"error": {"message": "boom"}, "code": 7}},
            *("failed", "boom"),
            id="the-result-is-one-with-a-code",
        ),
        pytest.param({"state": "FAILED", "status": "completed", "result": "x"}, "failed", "x", id="the-other-way"),
        pytest.param({"state": "SUCCESS", "status": "The crew is done", "result": "x"}, "completed", None, id="words"),
        pytest.param({"status": "completed", "error": None, "result": ""}, "completed", None, id="no-error"),
        pytest.param({"status": "completed", "error": "1 retry", "result": "x"}, "completed", None, id="and-a-result"),
        pytest.param({"status": "completed", "error": "x", "result_json": {"a": 1}}, "completed", None, id="and-data"),
        pytest.param(
            {"status": "completed", "result": {"error": "none found", "rows": []}}, "completed", None, id="a-field"
        ),
        pytest.param({"status": "completed", "result": {"error": None, "code": 0}}, "completed", None, id="null-field"),
    ],
)
def test_a_run_is_not_completed_and_failed_at_once(body: dict[str, Any], state: str, error: str | None):
    found = parse_status(body, "k")
    assert (found.state, found.error) == (CrewState(state), error)
    if state != "completed":
        assert (found.output, found.data) == (None, None)


@pytest.mark.parametrize("key", ["kickoff_id", "kickoffId", "execution_id", "executionId"])
def test_a_status_of_another_run_is_none_of_this_one(key: str):
    body = {"status": "completed", "result": "cats", key: "SOMEONE-ELSES"}
    with pytest.raises(ResponseFormatError, match="not that of another one") as caught:
        parse_status(body, "k1")
    assert caught.value.kickoff_id == "k1"
    for own in ("k1", "K1", 7, None):
        assert parse_status({**body, key: own}, "7" if own == 7 else "k1").output == "cats"
    assert parse_status({**body, "id": "k1", "executionId": "k1"}, "k1").output == "cats"


@pytest.mark.parametrize("bad", ["k\n1", "\x1b]0;x\x07", "k\x9b1", "k\u202e1", "k\u20281", "\u200bk", "k\t1"])
def test_an_id_with_control_characters_is_none(bad: str):
    with pytest.raises(ResponseFormatError) as caught:
        parse_kickoff({"kickoff_id": bad})
    assert kickoff_fate(caught.value) is KickoffFate.UNCERTAIN
    with pytest.raises(ResponseFormatError):
        parse_webhook("crew", {"kickoff_id": bad, "result": "x"})
    assert parse_kickoff({"kickoff_id": "run 1; é/'\"$(x)"}) == "run 1; é/'\"$(x)"
