"""Suspended flow runs on a real server and a real worker, brought back by the sweep alone."""

from __future__ import annotations

import time
from typing import Any

import pytest

from prefect_crew.server import CrewScript, CrewServer
from support.deployed import wait_until
from support.stage import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def spec(name: str, seconds: float, **task: Any) -> CrewScript:
    work = {"name": "t", "seconds": seconds, "output": "about {{ topic }}", **task}
    return CrewScript.model_validate({"name": name, "inputs": ["topic"], "tasks": [work]})


def ended(crew: CrewServer, runs: int) -> None:
    wait_until(
        lambda: len(crew.runs) == runs and all(run.state.ended for run in crew.runs), seconds=90, what="crews' ends"
    )


def swept_until(stage: Stage, flow_run_id: str, *names: str, seconds: float = 150.0) -> dict[str, Any]:
    """Sweep until the flow run is in one of these states, and return it."""
    deadline = time.monotonic() + seconds
    while (run := stage.seen.flow_run(flow_run_id))["state_name"] not in names:
        assert time.monotonic() < deadline, f"{flow_run_id} is {run['state_name']}, not {names}"
        if run["state_name"] == "Suspended":
            stage.sweep()
        time.sleep(0.5)
    return run


FLOWS = {
    "one": ({"topic": "tea"}, "about tea", 1),
    "several": ({"topics": ["a", "b", "c"]}, ["about a", "about b", "about c"], 3),
    "several_with_exceptions": ({"topics": ["d", "e"]}, ["about d", "about e"], 2),
    "in_turn": ({"topics": ["f", "g"]}, ["about f", "about g"], 2),
    "by_tasks": ({"topic": "x"}, "about x", 1),
    "steps": ({"topic": "y"}, "about about y and about other y", 3),
}


def test_each_kind_of_flow_suspends_and_completes_with_one_kickoff_each(stage: Stage):
    crews: dict[str, CrewServer] = {}
    runs: dict[str, str] = {}
    for flow, (parameters, _, _) in FLOWS.items():
        name = f"kind-{flow}".replace("_", "-")
        crews[flow] = stage.crew(name, spec(name, 25))
        runs[flow] = stage.start(flow, {"crew": name, **parameters})
    for run_id in runs.values():
        run = stage.wait_for(run_id, "Suspended", "Completed", "Failed", "Crashed", seconds=150)
        assert run["state_name"] == "Suspended", run["state"]["message"]
    for flow, run_id in runs.items():
        ended = swept_until(stage, run_id, "Completed", "Failed", "Crashed", seconds=300)
        assert ended["state_name"] == "Completed", ended["state"]["message"]
        assert stage.result_of(run_id) == FLOWS[flow][1]
    assert {flow: crew.kickoffs for flow, crew in crews.items()} == {flow: most for flow, (_, _, most) in FLOWS.items()}
    for crew in crews.values():
        assert set(crew.kickoffs_by_run_key.values()) == {1}
    assert not stage.notes()


def test_a_crew_that_ends_at_once_is_waited_for_in_the_process(stage: Stage):
    stage.crew("quick", spec("quick", 1))
    run_id = stage.start("one", {"crew": "quick", "topic": "tea"})
    run = stage.wait_for(run_id, "Suspended", "Completed", "Failed")
    assert run["state_name"] == "Completed", run["state"]["message"]
    states = [state["name"] for state in stage.call("GET", f"/flow_run_states/?flow_run_id={run_id}")]
    assert "Suspended" not in states


@pytest.mark.parametrize("flow", ["around_a_task", "around_a_subflow"])
def test_where_it_cannot_suspend_nothing_is_paid(flow: str, stage: Stage):
    crew = stage.crew("unpaid", spec("unpaid", 1))
    run = stage.wait_for(stage.start(flow, {"crew": "unpaid"}), "Failed", "Completed", "Crashed")
    assert run["state_name"] == "Failed"
    assert "Nothing was started" in run["state"]["message"]
    assert crew.kickoffs == 0


def test_runs_outlive_their_worker_and_their_prefect_server(stage: Stage):
    crew = stage.crew("outlived", spec("outlived", 30))
    another = stage.worker("second")
    runs = [stage.start("one", {"crew": "outlived", "topic": f"tea {number}"}) for number in range(3)]
    for run_id in runs:
        stage.wait_for(run_id, "Suspended")
    wait_until(lambda: another.process.family() == [another.process.pid], seconds=30, what="a worker without children")
    another.kill()
    stage.server.kill()
    stage.server.start()
    ended(crew, 3)
    for run_id in runs:
        assert swept_until(stage, run_id, "Completed", "Failed", "Crashed")["state_name"] == "Completed"
    assert crew.kickoffs == 3


def test_resuming_too_early_and_twice_does_no_harm(stage: Stage):
    crew = stage.crew("early", spec("early", 40))
    run_id = stage.start("one", {"crew": "early", "topic": "tea"})
    stage.wait_for(run_id, "Suspended")
    first = stage.resume(run_id)
    second = stage.resume(run_id)
    assert [first["status"], second["status"]] == ["ACCEPT", "ABORT"]
    stage.wait_for(run_id, "Running", "Pending", "Scheduled")
    stage.wait_for(run_id, "Suspended")  # its crew goes on, and so it is suspended again
    assert swept_until(stage, run_id, "Completed", "Failed", "Crashed")["state_name"] == "Completed"
    assert crew.kickoffs == 1
    states = [state["name"] for state in stage.call("GET", f"/flow_run_states/?flow_run_id={run_id}")]
    assert states.count("Suspended") == 2


def test_a_failed_crew_that_somebody_else_has_closed_is_not_bought_again_by_being_resumed(stage: Stage):
    crew = stage.crew("broken", spec("broken", 15, fail="the well is dry"))
    both = [stage.start("one", {"crew": "broken", "topic": "tea", "run_key": "shared"}) for _ in range(2)]
    for run_id in both:
        stage.wait_for(run_id, "Suspended", "Failed")
    ended(crew, 1)
    # One after the other, so that the second finds a record that is closed.
    for run_id in both:
        if stage.seen.flow_run(run_id)["state_name"] == "Suspended":
            stage.resume(run_id)
        run = stage.wait_for(run_id, "Failed", "Completed", "Crashed")
        assert "the well is dry" in run["state"]["message"]
    assert crew.kickoffs == 1
    assert not stage.notes()


def test_a_flow_run_that_is_cancelled_while_suspended_has_its_crew_stopped(stage: Stage):
    crew = stage.crew("unwanted", spec("unwanted", 600))
    run_id = stage.start("one", {"crew": "unwanted", "topic": "tea"})
    stage.wait_for(run_id, "Suspended")
    stage.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    stage.sweep()
    assert [str(run.state) for run in crew.runs] == ["stopped"]
    assert not stage.notes()


def test_a_run_over_its_time_fails_by_itself_and_is_not_lost(stage: Stage):
    crew = stage.crew("late", spec("late", 600))
    policy = {"mode": "suspend", "timeout": 12, "initial": 0.3, "max_interval": 1}
    run_id = stage.start("one", {"crew": "late", "topic": "tea", "wait": policy})
    stage.wait_for(run_id, "Suspended")
    run = swept_until(stage, run_id, "Failed", "Completed", "Crashed")
    assert run["state_name"] == "Failed"
    assert "CrewTimeoutError" in run["state"]["message"]
    assert crew.kickoffs == 1
