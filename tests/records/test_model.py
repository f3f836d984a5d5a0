"""What a record keeps of a run, and what it tells people."""

import pytest

from prefect_crew.client.models import CrewResult, TaskResult, TokenUsage
from prefect_crew.records.model import SPARE, Entry, StoredResult, fold
from support.records import new_record


def test_a_record_keeps_a_result_without_raw_bodies():
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


@pytest.mark.parametrize(("late", "left"), [(-1.0, 1.0), (1.0, 0.0)], ids=["before", "after"])
def test_a_permit_is_open_while_a_kickoff_may_be(late: float, left: float):
    claim = new_record(post_deadline=60.0)
    permit = Entry(idempotency_key=claim.idempotency_key, attempt=1, owner=claim.owner, good_for=30.0)
    permit.age = 30.0 + 60.0 + SPARE + late
    assert fold(claim, [permit], age=permit.age).open_for == pytest.approx(left)
