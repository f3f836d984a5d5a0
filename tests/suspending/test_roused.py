"""Suspended flow runs brought back by webhooks: lost, doubled, early, and with the receiver away in the middle."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from prefect_crew.server import CrewScript
from support.deployed import command, wait_until
from support.processes import Process
from support.stage import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def spec(name: str, seconds: float, **task: Any) -> CrewScript:
    work = {"name": "t", "seconds": seconds, "output": "about {{ topic }}", **task}
    return CrewScript.model_validate({"name": name, "inputs": ["topic"], "tasks": [work]})


@pytest.fixture(scope="module", autouse=True)
def worker(hooked: Stage) -> None:
    hooked.worker()


FAULTS = {
    "as they come": [],
    "doubled": ["webhook:double"],
    "delayed": ["webhook:delay=3"],
    "a third is lost": ["webhook:lose%0.3"],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_every_run_completes_with_one_kickoff(faults: list[str], hooked: Stage, request: pytest.FixtureRequest):
    name = f"roused-{list(FAULTS.values()).index(faults)}"
    crew = hooked.crew(name, spec(name, 20), faults=faults, seed=3)
    runs = [hooked.start("one", {"crew": name, "topic": f"tea {number}"}) for number in range(4)]
    for run_id in runs:
        hooked.wait_for(run_id, "Suspended")
    lossy = any("lose" in fault for fault in faults)
    deadline = time.monotonic() + 150
    while {(state := hooked.seen.flow_run(run_id)["state_name"]) for run_id in runs} != {"Completed"}:
        assert time.monotonic() < deadline, f"a flow run is {state}"
        if lossy and all(run.state.ended for run in crew.runs):
            hooked.sweep()
        time.sleep(1)
    assert crew.kickoffs == 4
    assert set(crew.kickoffs_by_run_key.values()) == {1}


def test_the_receiver_is_restarted_in_the_middle(hooked: Stage):
    crew = hooked.crew("interrupted", spec("interrupted", 25))
    run_id = hooked.start("one", {"crew": "interrupted", "topic": "tea"})
    hooked.wait_for(run_id, "Suspended")
    hooked.stop_receiver()
    hooked.start_receiver()
    assert hooked.wait_for(run_id, "Completed", "Failed", "Crashed", seconds=120)["state_name"] == "Completed"
    assert crew.kickoffs == 1


def test_the_receiver_is_away_at_the_end(hooked: Stage):
    crew = hooked.crew("missed", spec("missed", 15))
    run_id = hooked.start("one", {"crew": "missed", "topic": "tea"})
    hooked.wait_for(run_id, "Suspended")
    hooked.stop_receiver()
    wait_until(lambda: all(run.state.ended for run in crew.runs), seconds=60, what="the crew's end")
    hooked.start_receiver()
    assert hooked.seen.flow_run(run_id)["state_name"] == "Suspended"
    hooked.sweep()
    assert hooked.wait_for(run_id, "Completed", "Failed", "Crashed")["state_name"] == "Completed"
    assert crew.kickoffs == 1


def test_receiver_and_sweep_at_once_do_no_harm(hooked: Stage):
    crew = hooked.crew("both", spec("both", 15))
    run_id = hooked.start("steps", {"crew": "both", "topic": "tea"})
    deadline = time.monotonic() + 200
    while hooked.seen.flow_run(run_id)["state_name"] not in ("Completed", "Failed", "Crashed"):
        assert time.monotonic() < deadline
        hooked.sweep()
    assert hooked.seen.flow_run(run_id)["state_name"] == "Completed"
    assert crew.kickoffs == 3


def test_a_person_is_told_of_while_the_flow_run_stays_suspended(hooked: Stage):
    crew = hooked.crew("asking", spec("asking", 12, human=True))
    run_id = hooked.start("one", {"crew": "asking", "topic": "tea"})
    hooked.wait_for(run_id, "Suspended")
    wait_until(lambda: [str(run.state) for run in crew.runs] == ["waiting"], seconds=60, what="a question")

    def told() -> bool:
        body = {"variables": {"tags": {"all_": ["prefect-crew"]}}, "limit": 200}
        values = [variable["value"] for variable in hooked.call("POST", "/variables/filter", body)]
        return any(value["crew"] == "asking" and value.get("human_since") for value in values)

    wait_until(told, seconds=60, what="a record of who is waited for")
    assert hooked.seen.flow_run(run_id)["state_name"] == "Suspended"
    kickoff_id = crew.runs[0].id
    command("prefect-crew", "resume", "asking", kickoff_id, "--approve", env=hooked.env)
    wait_until(lambda: crew.runs[0].state.ended, seconds=60, what="the crew's end")
    hooked.sweep()  # the answer above brought no webhooks of its own
    assert hooked.wait_for(run_id, "Completed", "Failed", "Crashed")["state_name"] == "Completed"
    assert crew.kickoffs == 1


def test_a_served_flow_suspends_and_is_brought_back(hooked: Stage):
    crew = hooked.crew("served", spec("served", 20))
    log = hooked.folder / "served.log"
    env = {**hooked.env, **hooked.hooks}
    with Process([sys.executable, "suspending_flows.py"], log=log, env=env, cwd=hooked.folder) as process:
        process.wait_for("one/served")
        run_id = hooked.start("one/served", {"crew": "served", "topic": "tea"})
        hooked.wait_for(run_id, "Suspended")
        assert hooked.wait_for(run_id, "Completed", "Failed", "Crashed", seconds=120)["state_name"] == "Completed"
    assert crew.kickoffs == 1
