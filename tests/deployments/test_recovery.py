"""Flow processes that are killed, and how their runs go on: unattended under a worker, by hand where a flow is served.

A worker that dies with its flow runs: test_two_workers.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.deployed import ROOT, command, flow_processes, wait_for_state, wait_until
from support.processes import Process
from support.site import Site
from support.workers import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SLOW = "name: slow\ninputs: [topic]\ntasks: [{name: t, seconds: 20, output: done}]\n"
BROKEN = "name: broken\ninputs: [topic]\ntasks: [{name: t, fail: the well is dry}]\n"
SUICIDAL = """
import os, signal
from prefect import flow

@flow
def suicidal():
    os.kill(os.getpid(), signal.SIGKILL)
"""
DEPLOY_SUICIDAL = """
deployments:
  - name: tagged
    entrypoint: suicidal.py:suicidal
    work_pool: {name: processes}
    tags: [recover-crashed]
    schedules: null
    pull:
      - prefect.deployments.steps.set_working_directory: {directory: FOLDER}
"""


def kill_flow(process: Process, flow_run_id: str) -> float:
    """SIGKILL the process of a flow run; return when (monotonic seconds)."""
    pids = flow_processes(process, flow_run_id)
    assert pids, "the flow run has no process"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def waits(crew: CrewServer) -> bool:
    """Return whether the crew was kicked off and its status has been asked for."""
    return crew.kickoffs > 0 and crew.requests["status"] > 0


def next_status(crew: CrewServer, since: int) -> bool:
    return crew.requests["status"] > since


def recoveries(site: Site, flow_run_id: str) -> list[dict[str, Any]]:
    return [run for run in site.seen.flow_runs("recover") if run["parameters"].get("flow_run_id") == flow_run_id]


def test_a_run_killed_under_a_worker_goes_on_unattended_and_a_failed_one_does_not(
    site: Site, worker: Worker, notes: list[str]
):
    broken = site.add_crew("broken", BROKEN)
    failed = site.start("one-crew/daily", {"crew": "broken", "inputs": {"topic": "tea"}})
    assert wait_for_state(site.seen, failed)["state_type"] == "FAILED"

    crew = site.add_crew("slow", SLOW)
    run_id = site.start("one-crew/daily", {"crew": "slow", "inputs": {"topic": "tea"}})
    wait_until(lambda: waits(crew), seconds=60, what="a crew that is waited for")
    killed = kill_flow(worker.process, run_id)
    asked = crew.requests["status"]
    wait_until(lambda: next_status(crew, asked), seconds=120, what="a run that is waited for again")
    notes.append(f"worker, flow process killed: waited for again after {time.monotonic() - killed:.1f} s, unattended")

    run = wait_for_state(site.seen, run_id)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["run_count"] == 2
    assert crew.kickoffs == 1
    (recovery,) = recoveries(site, run_id)
    assert wait_for_state(site.seen, recovery["id"])["state_type"] == "COMPLETED"
    assert "scheduled again, attempt 2 of 3" in site.seen.logs(recovery["id"])

    assert site.seen.flow_run(failed)["run_count"] == 1
    assert not recoveries(site, failed)
    assert broken.kickoffs == 1


def test_a_flow_that_kills_its_process_each_time_is_given_up_after_its_attempts(
    site: Site, worker: Worker, tmp_path: Path
):
    (tmp_path / "suicidal.py").write_text(SUICIDAL)
    (tmp_path / "prefect.yaml").write_text(DEPLOY_SUICIDAL.replace("FOLDER", str(tmp_path)))
    command("prefect", "--no-prompt", "deploy", "--all", env=site.env, cwd=tmp_path)
    run_id = site.start("suicidal/tagged")

    def given_up() -> bool:
        return any("given up after 3 attempts" in site.seen.logs(one["id"]) for one in recoveries(site, run_id))

    wait_until(given_up, seconds=200, what="a recovery that gives up", pause=2)
    run = site.seen.flow_run(run_id)
    assert (run["state_type"], run["run_count"]) == ("CRASHED", 3)
    assert len(recoveries(site, run_id)) == 3


def test_a_run_killed_where_a_flow_is_served_goes_on_when_it_is_retried(site: Site, tmp_path: Path, notes: list[str]):
    crew = site.add_crew("slow", SLOW)
    flow = ROOT / "flows" / "one_crew.py"
    with Process([sys.executable, flow], log=tmp_path / "log", env=site.env, cwd=ROOT) as process:
        process.wait_for("served")
        run_id = site.start(
            "one-crew/served", {"crew": "slow", "inputs": {"topic": "coffee"}, "idempotency_key": "killed"}
        )
        wait_until(lambda: waits(crew), seconds=60, what="a crew that is waited for")
        killed = kill_flow(process, run_id)
        asked = crew.requests["status"]
        assert wait_for_state(site.seen, run_id)["state_type"] == "CRASHED"
        seen = time.monotonic() - killed
        site.run("prefect", "flow-run", "retry", run_id)
        wait_until(lambda: next_status(crew, asked), seconds=120, what="a run that is waited for again")
        notes.append(
            f"served, flow process killed: Crashed after {seen:.1f} s, waited for again after "
            f"{time.monotonic() - killed:.1f} s, retried at once"
        )
        run = wait_for_state(site.seen, run_id)
        site.call("DELETE", f"/deployments/{run['deployment_id']}")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert crew.kickoffs == 1


ALL = {"limit": 20, "exclude_keys": []}


def form_of(site: Site, flow_run_id: str, *, not_key: str | None = None) -> dict[str, Any]:
    """Wait until a form is up, under another pause key than this one, and return the details of the state."""

    def look() -> dict[str, Any] | None:
        run = site.seen.flow_run(flow_run_id)
        details = run["state"]["state_details"]
        if run["state_type"] != "PAUSED" or details["pause_key"] == not_key:
            return None
        body = {**ALL, "prefix": details["run_input_keyset"]["description"]}
        return details if site.call("POST", f"/flow_runs/{flow_run_id}/input/filter", body) else None

    return wait_until(look, seconds=120, what="a form")


def test_a_flow_run_killed_with_its_form_up_asks_again_in_the_same_form(site: Site, worker: Worker):
    crew = site.crews["draft"]
    run_id = site.start("reviewed-report/by-form")
    first = form_of(site, run_id)
    kill_flow(worker.process, run_id)
    again = form_of(site, run_id, not_key=first["pause_key"])
    assert again["run_input_keyset"] == first["run_input_keyset"]
    assert len(site.call("POST", f"/flow_runs/{run_id}/input/filter", {**ALL, "prefix": "crew-review-"})) == 2
    answer = site.call("POST", f"/flow_runs/{run_id}/resume", {"run_input": {"decision": "approve", "name": "Ada"}})
    assert answer["status"] == "ACCEPT"
    assert wait_for_state(site.seen, run_id)["state_name"] == "Completed"
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]
