"""What a record keeps of a run, and what it tells people."""

from __future__ import annotations

from prefect_crew.client.models import CrewResult, TaskResult, TokenUsage
from prefect_crew.records.model import StoredResult


def test_a_result_survives_the_record_without_its_raw_bodies():
    result = CrewResult(
        output="Lisbon",
        data={"days": 3},
        tasks=[TaskResult(name="plan", agent="Planner", output="…", execution_time=1.5, raw={"big": 1})],
        kickoff_id="r1",
        execution_time=2.5,
        usage=TokenUsage(total_tokens=7),
        raw={"big": 1},
    )
    kept = StoredResult.model_validate_json(StoredResult.of(result).model_dump_json()).result("r1")
    assert "big" not in kept.model_dump_json()
    bare = result.model_copy(update={"raw": None, "tasks": [result.tasks[0].model_copy(update={"raw": None})]})
    assert kept == bare
