"""From the time that a run is scheduled for to the crew's first request, with the documented worker settings.

Deploys flows/one_crew.py with a schedule of every half minute, starts a process worker that looks for work every two
seconds (PREFECT_WORKER_QUERY_SECONDS=2, as docs/deployments.md and deployments/compose.yaml have it), and measures at
the crew's server. Needs PREFECT_API_URL: a server of its own. What it deployed is deleted at the end.
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
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from prefect_crew.devserver import CrewScript, CrewServer

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
POOL = "schedule-latency"
EVERY = 30
SCRIPT = {"name": "prompt", "inputs": ["topic"], "tasks": [{"name": "work", "seconds": 0.1, "output": "done"}]}
YAML = f"""
build: [{{prefect.deployments.steps.run_shell_script: {{id: here, script: pwd, stream_output: false}}}}]
pull: [{{prefect.deployments.steps.set_working_directory: {{directory: "{{{{ here.stdout }}}}"}}}}]
deployments:
  - name: schedule-latency
    entrypoint: flows/one_crew.py:one_crew
    work_pool: {{name: {POOL}}}
    parameters: {{crew: schedule-latency, inputs: {{topic: tea}}}}
    schedules:
      - interval: {EVERY}
        parameters: {{idempotency_key: "latency-{{{{ scheduled_start:%Y-%m-%dT%H:%M:%S }}}}"}}
"""


def api(method: str, path: str, body: Any = None) -> Any:
    answer = httpx.request(method, f"{os.environ['PREFECT_API_URL']}{path}", json=body, timeout=30, trust_env=False)
    return answer.raise_for_status().json() if answer.content else None


def first_request(server: CrewServer) -> float:
    """Wait for the next request to a crew that nobody has asked yet; return when it came (seconds since the epoch)."""
    while not sum(server.requests.values()):
        time.sleep(0.02)
    return time.time()


def end(worker: subprocess.Popen[bytes]) -> None:
    """A worker does not always believe its first SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        worker.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(10)
            return


def scheduled_time(deployment: str, idempotency_key: str) -> float:
    """Return the time that the flow run of an idempotency key was scheduled for (seconds since the epoch)."""
    runs = api("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}, "limit": 200})
    # The key has no fractions of a second.
    (expected,) = [
        run["expected_start_time"] for run in runs if f"latency-{run['expected_start_time'][:19]}" == idempotency_key
    ]
    return datetime.fromisoformat(expected).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=6)
    runs = parser.parse_args().runs
    if not os.environ.get("PREFECT_API_URL"):
        raise SystemExit("Set PREFECT_API_URL to a server that may be deployed to.")
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    lags: list[float] = []
    with tempfile.TemporaryDirectory() as folder, CrewServer(CrewScript.model_validate(SCRIPT)) as server:
        block: Any = server.crew()
        block.save("schedule-latency", overwrite=True)
        file = Path(folder, "prefect.yaml")
        file.write_text(YAML)
        worker = subprocess.Popen(
            ["prefect", "worker", "start", "--pool", POOL, "--type", "process"], env=env, cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deployment = None
        try:
            time.sleep(10)  # the worker makes the pool
            deploy = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
            subprocess.run(deploy, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            deployment = api("GET", "/deployments/name/one-crew/schedule-latency")["id"]
            while len(lags) < runs:
                before = set(server.kickoffs_by_key)
                server.counters.requests.clear()
                at = first_request(server)
                while set(server.kickoffs_by_key) == before:
                    time.sleep(0.02)
                (key,) = set(server.kickoffs_by_key) - before
                lags.append(at - scheduled_time(deployment, key))
                print(f"{key}: first request after {lags[-1]:.2f} s", flush=True)
                time.sleep(EVERY / 3)  # the run has ended by then, and the next one has not begun
        finally:
            end(worker)
            if deployment:
                api("DELETE", f"/deployments/{deployment}")
    print(f"median {statistics.median(lags):.2f} s, slowest {max(lags):.2f} s, of {len(lags)}")


if __name__ == "__main__":
    main()
