"""What suspended flow runs hold while they wait, and how soon after being resumed their code looks at its crew.

Deploys flows/one_crew.py for a crew whose block says mode="suspend", starts a process worker that looks for work every
two seconds (PREFECT_WORKER_QUERY_SECONDS=2, as docs/deployments.md and deployments/compose.yaml have it), and has many
runs of it suspended. Then it counts the processes and the memory that are left besides the worker's own, and resumes
some, one at a time: from the answer to `resume` to the first status request at the crew. Needs PREFECT_API_URL: a
server of its own. What it deployed is deleted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from prefect_crew import WaitPolicy
from prefect_crew.server import CrewScript, CrewServer

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
POOL = "suspend-benchmark"
SCRIPT = {"name": "long", "inputs": ["topic"], "tasks": [{"name": "work", "seconds": 100_000, "output": "done"}]}
YAML = f"""
build: [{{prefect.deployments.steps.run_shell_script: {{id: here, script: pwd, stream_output: false}}}}]
pull: [{{prefect.deployments.steps.set_working_directory: {{directory: "{{{{ here.stdout }}}}"}}}}]
deployments:
  - name: suspend-benchmark
    entrypoint: flows/one_crew.py:one_crew
    work_pool: {{name: {POOL}}}
    schedules: null
"""


def api(method: str, path: str, body: Any = None) -> Any:
    while True:
        answer = httpx.request(method, f"{os.environ['PREFECT_API_URL']}{path}", json=body, timeout=60, trust_env=False)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite was locked
            return answer.raise_for_status().json() if answer.content else None
        time.sleep(0.1)


def end(worker: subprocess.Popen[bytes]) -> None:
    """A worker does not always believe its first SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        worker.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(10)
            return


def below(pid: int) -> dict[int, float]:
    """Return the processes below one, with their resident memory in MB."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    memory = {}
    for one in found - {pid}:
        with contextlib.suppress(OSError, IndexError):
            memory[one] = int(Path(f"/proc/{one}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    return memory


def states(deployment: str) -> Counter[str]:
    return Counter(run["state_name"] for run in runs_of(deployment))


def runs_of(deployment: str) -> list[dict[str, Any]]:
    return api("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}, "limit": 200})


def resumed(server: CrewServer, flow_run_id: str) -> float:
    """Resume a flow run; return the seconds until its code asks the crew for the status."""
    before = server.requests["status"]
    assert api("POST", f"/flow_runs/{flow_run_id}/resume", {})["status"] == "ACCEPT"
    started = time.perf_counter()
    while server.requests["status"] == before:
        time.sleep(0.01)
    took = time.perf_counter() - started
    while api("GET", f"/flow_runs/{flow_run_id}")["state_name"] != "Suspended":
        time.sleep(0.2)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--resumes", type=int, default=10)
    parser.add_argument("--worker-log", type=Path, help="a file for what the worker and its runs print")
    given = parser.parse_args()
    if not os.environ.get("PREFECT_API_URL"):
        raise SystemExit("Set PREFECT_API_URL to a server that may be deployed to.")
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    printed = given.worker_log.open("w") if given.worker_log else contextlib.nullcontext(subprocess.DEVNULL)
    crew_server = CrewServer(CrewScript.model_validate(SCRIPT))
    with tempfile.TemporaryDirectory() as folder, crew_server as server, printed as log:
        block: Any = server.crew(wait=WaitPolicy(mode="suspend"))
        block.save("suspend-benchmark", overwrite=True)
        file = Path(folder, "prefect.yaml")
        file.write_text(YAML)
        worker = subprocess.Popen(
            ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "4"],
            env=env, cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
        deployment = None
        try:
            time.sleep(10)  # the worker makes the pool
            deploy = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
            subprocess.run(deploy, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            deployment = api("GET", "/deployments/name/one-crew/suspend-benchmark")["id"]
            for number in range(given.runs):
                parameters = {"crew": "suspend-benchmark", "inputs": {"topic": f"number {number}"}}
                api("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})
            began = time.monotonic()
            while (now := states(deployment))["Suspended"] + now["Failed"] + now["Crashed"] < given.runs:
                time.sleep(2)
            took = time.monotonic() - began
            while left := below(worker.pid):
                if time.monotonic() - began > took + 60:
                    break
                time.sleep(0.5)
            print(
                f"{dict(now)} after {took:.0f} s, {server.kickoffs} kickoffs; besides the worker "
                f"they hold {len(left)} processes, {sum(left.values()):.0f} MB",
                flush=True,
            )
            for run in runs_of(deployment):
                if run["state_name"] != "Suspended":
                    print(f"{run['name']}: {run['state_name']}: {run['state']['message']}", flush=True)
            runs = [run["id"] for run in runs_of(deployment) if run["state_name"] == "Suspended"][: given.resumes]
            lags = [resumed(server, run_id) for run_id in runs]
            print(
                f"resume -> code: median {statistics.median(lags):.1f} s, slowest {max(lags):.1f} s, of {len(lags)}; "
                f"{server.kickoffs} kickoffs"
            )
        finally:
            end(worker)
            if deployment:
                api("DELETE", f"/deployments/{deployment}")


if __name__ == "__main__":
    main()
