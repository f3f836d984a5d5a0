"""The same in a browser: the page of a suspended flow run opens the form, and its answer brings the flow run back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from prefect_crew.server import CrewScript
from support.chromium import Chromium
from support.deployed import wait_until
from support.review_page import answer_on_page
from support.stage import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

SCRIPT = {
    "inputs": ["topic"],
    "tasks": [
        {"name": "draft", "human": True, "output": "{{ topic }} *number {{ round }}* <b>for you</b>. {{ feedback }}"},
        {"name": "print", "output": "Printed: {{ tasks.draft.output }}"},
    ],
}


@pytest.mark.parametrize("ui", ["v1", "v2"], ids=["older-interface", "newer-interface"])
def test_a_person_answers_on_the_page_of_a_suspended_flow_run(
    stage: Stage, chromium: Chromium, ui: Literal["v1", "v2"], tmp_path: Path
):
    crew = stage.crew(f"page-{ui}", CrewScript.model_validate({"name": f"page-{ui}", **SCRIPT}), dialect="union")
    run_id = stage.start("reviewed", {"crew": f"page-{ui}", "topic": "tea"})
    worker, url = stage.workers[0].process, stage.server.ui_url
    first = stage.form(run_id)
    with chromium.page(height=1100) as page:
        wait_until(lambda: worker.family() == [worker.pid], seconds=60, what="a worker without children")
        answer_on_page(page, url, run_id, ui, "reject", "Warmer.", tmp_path / f"{ui}-rejecting.png", round=1)
        second = stage.form(run_id, not_key=first.key)
        answer_on_page(page, url, run_id, ui, "approve", "", tmp_path / f"{ui}-approving.png", round=2)
    assert [first.state, second.state] == ["Suspended", "Suspended"]
    run = stage.wait_for(run_id, "Completed", "Failed", "Crashed", seconds=150)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert stage.result_of(run_id) == "Printed: tea *number 2* <b>for you</b>. Warmer."
    assert [crew.requests["resume"], crew.kickoffs] == [2, 1]
