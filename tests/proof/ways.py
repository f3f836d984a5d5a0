"""Three ways in which Prefect runs a flow in a process of its own: served, on a process worker, with subflows there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_crew.runs.database import URL_SETTING
from support.deployed import command, wait_for_state, wait_until
from support.prefect_server import PrefectServer
from support.processes import Process
from support.seen import Seen
from support.workers import Worker

__all__ = ["WAYS", "Way", "Ways"]

WAYS = {"served": "killable", "worker": "killable", "subflow": "parent"}
"""Each way and the flow that it runs."""
HERE = Path(__file__).parent
POOL = "killable"


@dataclass(frozen=True)
class Way:
    """One way: the deployment that starts a run of it, and the process that flow runs come from."""

    name: str
    deployment_id: str
    process: Process


class Ways:
    """All three at work, clients of one Prefect server; a context manager."""

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.seen = Seen(server)
        self._open = ExitStack()
        self._ways: dict[str, Way] = {}
        self.crew_database = f"sqlite:///{folder / 'crew.db'}"
        self._env = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
        self._env[URL_SETTING] = self.crew_database

    def __enter__(self) -> Ways:
        self._open.callback(self.seen.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def way(self, name: str) -> Way:
        """Return a way, started when it is first asked for."""
        if name not in self._ways:
            self._ways[name] = self._served() if name == "served" else self._working(name)
        return self._ways[name]

    def _served(self) -> Way:
        env = self.server.env(home=self.folder / "served-home", PREFECT_RUNNER_POLL_FREQUENCY="1", **self._env)
        command_line = [sys.executable, HERE / "killable.py", "served"]
        process = self._open.enter_context(Process(command_line, log=self.folder / "served.log", env=env, cwd=HERE))
        process.wait_for("prefect deployment run")
        return Way("served", self.seen.get("/deployments/name/killable/served")["id"], process)

    def _working(self, name: str) -> Way:
        other = next((way for way in self._ways.values() if way.name != "served"), None)
        if other is None:
            worker = Worker(self.server, POOL, folder=self.folder, env=self._env)
            process = self._open.enter_context(worker).process
        else:
            process = other.process
        flow_id = self.seen.post("/flows/", {"name": WAYS[name]})["id"]
        body = {
            "name": name,
            "flow_id": flow_id,
            "work_pool_name": POOL,
            "path": str(HERE),
            "entrypoint": f"killable.py:{WAYS[name]}",
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}],
        }
        return Way(name, self.seen.post("/deployments/", body)["id"], process)

    def start(self, way: Way, parameters: Mapping[str, Any]) -> str:
        """Start a flow run and return its id."""
        body = {"parameters": dict(parameters)}
        return self.seen.post(f"/deployments/{way.deployment_id}/create_flow_run", body)["id"]

    def crashed(self, way: Way, flow_run_id: str) -> dict[str, Any]:
        """Wait until a flow run has ended, and until a worker has said all that it says about a death.

        Prefect 3.9.1 reports it twice under a worker: first the process that the worker started for it, seconds later
        the worker. The second report puts a run that was retried in between back to Crashed.
        """
        run = self.ended(flow_run_id)
        if way.name != "served" and run["state_type"] == "CRASHED":
            first, second = f"'{flow_run_id}' as crashed", "prefect.flow_runs.worker - Check whether"
            wait_until(
                lambda: second in way.process.output.rpartition(first)[2],
                what=f"the worker's own word on {flow_run_id}",
            )
        return run

    def retry(self, flow_run_id: str) -> None:
        """Run a flow run that has ended once more, as a person does."""
        command("prefect", "flow-run", "retry", flow_run_id, env=self.server.env(home=self.folder / "home"))

    def ended(self, flow_run_id: str, *states: str) -> dict[str, Any]:
        """Wait for a state of a flow run and return it."""
        return wait_for_state(self.seen, flow_run_id, *states)
