"""What parts of answers say on their own; whole bodies are those of the corpus."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_crew.api.parsing import waiting_output

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
