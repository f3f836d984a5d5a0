"""What a batch tells when it ends: the state of its flow run, and an event."""

import uuid
from pathlib import Path
from typing import Any

import pytest

import prefect_crew as pc
from prefect_crew.testing import CrewServerFactory
from support.batches import topics
from support.scripts import PICKY
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
ONE = pc.Budget(per="day", max_kickoffs=1)

ENDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "completed": ({}, "COMPLETED", "completed"),
    "a row failed": ({"bad": {1}}, "FAILED", "failed"),
    "no budget": ({"budgets": [ONE]}, "FAILED", "failed"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_flow_run_and_an_event_tell_the_end(crew_server: CrewServerFactory, seen: Seen, tmp_path: Path, end: str):
    options, state, event = ENDS[end]
    name, rows = f"it's {uuid.uuid4().hex[:8]}", topics(3, options.get("bad", ()))
    more = {key: value for key, value in options.items() if key != "bad"}
    report = pc.run_batch(crew_server(PICKY).crew(), rows, name=name, export=str(tmp_path / "out.jsonl"), **more)
    assert report.ok is (state == "COMPLETED"), "it is returned, whatever its flow run says"
    (run,) = [run for run in seen.flow_runs("run-batch") if run["name"] == name]
    assert run["state_type"] == state
    assert state == "COMPLETED" or run["state"]["message"] == str(report)
    (emitted,) = seen.events(name, "batch")
    assert emitted["event"] == f"crew.batch.{event}"
    assert emitted["resource"]["prefect-crew.batch"] == name
    assert f"prefect.flow-run.{run['id']}" in {related["prefect.resource.id"] for related in emitted["related"]}
    facts = {key: getattr(report, key) for key in ("total", "completed", "failed", "uncertain", "skipped", "stopped")}
    assert emitted["payload"] == {"batch": name, "reason": str(report), **facts}
    if end == "no budget":
        assert "Nothing was started. Make the same call again then, or raise max_kickoffs." in str(report.stopped)


def test_a_batch_that_an_error_ended_is_told_too(crew_server: CrewServerFactory, seen: Seen, tmp_path: Path):
    name = uuid.uuid4().hex[:8]
    with pytest.raises(pc.DatasetError) as caught:
        pc.run_batch(crew_server(PICKY).crew(), [{"topic": ""}], name=name, export=str(tmp_path / "out.jsonl"))
    (emitted,) = seen.events(name, "batch")
    assert (emitted["event"], emitted["payload"]) == (
        "crew.batch.failed",
        {"batch": name, "reason": str(caught.value)},
    )
    (run,) = [run for run in seen.flow_runs("run-batch") if run["name"] == name]
    assert "has no value for topic" in run["state"]["message"]
