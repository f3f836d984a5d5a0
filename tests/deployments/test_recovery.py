"""How flow runs go on whose processes are killed: by a worker, by another one, or by hand where a flow is served."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.deployed import ROOT, flow_processes, wait_for_state, wait_until
from support.postgres import Postgres
from support.prefect_server import PrefectServer
from support.processes import Process
from support.site import Site
from support.workers import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = "name: slow\ninputs: [topic]\ntasks: [{name: t, seconds: 20, output: done}]\n"
BROKEN = "name: broken\ninputs: [topic]\ntasks: [{name: t, fail: the well is dry}]\n"


def kill_flow(process: Process, flow_run_id: str) -> float:
    """SIGKILL the process of a flow run; return when (monotonic seconds)."""
    pids = flow_processes(process, flow_run_id)
    assert pids, "the flow run has no process"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def wait_for_polls(crew: CrewServer) -> int:
    """Wait until the crew was kicked off and its status has been asked for; return how often."""
    return wait_until(lambda: crew.kickoffs and crew.requests["status"], what="a crew that is waited for")


def wait_for_next_poll(crew: CrewServer, since: int) -> float:
    """Wait until a run is waited for again; return when (monotonic seconds)."""
    wait_until(lambda: crew.requests["status"] > since, "a run that is waited for again")
    return time.monotonic()


def recoveries(site: Site, flow_run_id: str) -> list[dict[str, Any]]:
    return [run for run in site.seen.flow_runs("recover") if run["parameters"].get("flow_run_id") == flow_run_id]


def test_a_killed_run_goes_on_and_a_failed_one_does_not(site: Site, worker: Worker, notes: list[str]):
    """It is killed twice: a second crash of the same flow run is one more event for the automation."""
    broken = site.add_crew("broken", BROKEN)
    failed = site.start("one-crew/daily", {"crew": "broken", "inputs": {"topic": "tea"}})
    assert wait_for_state(site.seen, failed)["state_type"] == "FAILED"

    crew = site.add_crew("slow", SLOW.replace("20", "90"))
    run_id = site.start("one-crew/daily", {"crew": "slow", "inputs": {"topic": "tea"}})
    wait_for_polls(crew)
    for attempt in (2, 3):
        killed = kill_flow(worker.process, run_id)
        seconds = wait_for_next_poll(crew, crew.requests["status"]) - killed
        notes.append(f"worker, flow process killed: waited for again after {seconds:.1f} s, unattended, as {attempt}")

    run = wait_for_state(site.seen, run_id)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["run_count"] == 3
    assert crew.kickoffs == 1
    for attempt, recovery in enumerate(recoveries(site, run_id), start=2):
        assert wait_for_state(site.seen, recovery["id"])["state_type"] == "COMPLETED"
        assert f"scheduled again, attempt {attempt} of 3" in site.seen.logs(recovery["id"])
    assert len(recoveries(site, run_id)) == 2

    assert site.seen.flow_run(failed)["run_count"] == 1
    assert not recoveries(site, failed)
    assert broken.kickoffs == 1


def test_a_run_killed_where_a_flow_is_served_is_retried(site: Site, tmp_path: Path, notes: list[str]):
    crew = site.add_crew("slow", SLOW)
    flow = ROOT / "flows" / "one_crew.py"
    with Process([sys.executable, flow], log=tmp_path / "log", env=site.env, cwd=ROOT) as process:
        process.wait_for("served")
        parameters = {"crew": "slow", "inputs": {"topic": "coffee"}, "idempotency_key": "killed"}
        run_id = site.start("one-crew/served", parameters)
        wait_for_polls(crew)
        killed = kill_flow(process, run_id)
        asked = crew.requests["status"]
        assert wait_for_state(site.seen, run_id)["state_type"] == "CRASHED"
        seen = time.monotonic() - killed
        site.run("prefect", "flow-run", "retry", run_id)
        again = wait_for_next_poll(crew, asked) - killed
        notes.append(f"served, flow process killed: Crashed after {seen:.1f} s, waited for again after {again:.1f} s")
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

    return wait_until(look, what="a form")


def test_a_run_killed_with_its_form_up_shows_it_again(site: Site, worker: Worker):
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
    assert crew.requests["resume"] == 1
    assert crew.kickoffs == 1


LONG_WRITE = """
name: write
inputs: [topic, audience, notes]
tasks: [{name: draft, seconds: 30, output: "# {{ topic }}\\n{{ notes }}"}]
"""


def test_a_pipeline_ends_on_the_other_worker(tmp_path: Path, postgres: Postgres, notes: list[str]):
    """On PostgreSQL. Heartbeats stop, an automation calls that a crash, another one has the run begun again."""
    url = postgres.create_database("site")
    with PrefectServer(tmp_path, database_url=url) as server, Site(server, tmp_path) as site:
        write = site.add_crew("write", LONG_WRITE)
        workers = [site.worker("one"), site.worker("two")]
        run_id = site.start("report-pipeline/weekly", {"topic": "tea", "idempotency_key": "two-workers"})
        wait_for_polls(write)
        # Not by their logs: the one that came too late for the run names it as well.
        (dead,) = [worker for worker in workers if flow_processes(worker.process, run_id)]
        (alive,) = set(workers) - {dead}
        dead.kill()
        killed = time.monotonic()
        again = wait_for_next_poll(write, write.requests["status"]) - killed
        notes.append(f"worker killed with its flow run: waited for by another one after {again:.0f} s (heartbeat 30 s)")
        run = wait_for_state(site.seen, run_id, "COMPLETED", "FAILED", "CANCELLED")
        assert run["state_type"] == "COMPLETED", run["state"]["message"]
        assert run["run_count"] == 2
        assert str(run_id) in alive.log.read_text()
        for step in ("research", "write", "review"):
            ours = {key: n for key, n in site.crews[step].kickoffs_by_key.items() if key.startswith("two-workers/")}
            assert ours == {f"two-workers/{step}": 1}
        states = site.call("GET", f"/flow_run_states/?flow_run_id={run_id}")
        names = [(state["name"], state["message"]) for state in sorted(states, key=lambda one: one["timestamp"])]
        assert ("Crashed", "No heartbeat for 90 s.") in names
        assert [name for name, _ in names].count("Running") == 2
