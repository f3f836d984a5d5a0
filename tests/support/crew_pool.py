"""A work pool of type `crew` with workers in processes of their own, and crews on loopback."""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer, Outcome, Run
from support.deployed import command, wait_for_state
from support.prefect_server import PrefectServer, connected
from support.seen import Seen
from support.waiting import LIMIT
from support.workers import Worker

RUN_CREW = "prefect_crew.flows.run_deployed_crew"
USER_FLOWS = "crew_worker_flows"
"""A module of tests/support/importable, as a package of the user's that is installed where the worker runs."""
EXITS = "crew_worker_exits"
"""Another one, which cannot be imported."""
IMPORTABLE = Path(__file__).parent / "importable"


class CrewOnCommand:
    """A crew whose runs end once `ended` is set, in all threads."""

    name = "on-command"

    def __init__(self) -> None:
        self.ended = False

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="topic")]

    async def execute(self, run: Run) -> Outcome:
        while not self.ended:
            await asyncio.sleep(0.02)
        return Outcome(f"About {run.inputs['topic']}")


class Crews:
    """A Prefect server with crews behind it; a context manager that ends what was started within."""

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.database_url = f"sqlite:///{folder / 'crew.db'}"
        self.env = server.env(home=folder / "home", PREFECT_INTEGRATIONS_CREW_DATABASE_URL=self.database_url)
        self.crews: dict[str, CrewServer] = {}
        self.seen = Seen(server)
        self._open = contextlib.ExitStack()
        self._open.callback(self.seen.close)

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        return self.seen.call(method, path, body)

    def add_crew(self, name: str, spec: Any, *, wait: Mapping[str, Any] | None = None, **options: Any) -> CrewServer:
        """Start a crew and store it as a block. One of that name from before loses its block, and runs on."""
        crew = self.crews[name] = self._open.enter_context(CrewServer(spec, **options))
        with connected(self.server, self.folder / "home"):
            block: Any = crew.crew(wait=dict({"initial": 0.1, "max_interval": 0.5} if wait is None else wait))
            block.save(name, overwrite=True, _sync=True)  # whatever kind of test calls it
        return crew


class CrewPool(Crews):
    """A work pool of type `crew`."""

    _numbers = itertools.count(1)

    def __init__(
        self, server: PrefectServer, folder: Path, name: str | None = None, *, heartbeat: int = 30, kind: str = "crew"
    ) -> None:
        super().__init__(server, folder)
        self.name = name or f"crews-{next(self._numbers)}"
        self.heartbeat = heartbeat
        self.kind = kind

    def __enter__(self) -> Self:
        command("prefect", "work-pool", "create", self.name, "--type", self.kind, env=self.env)
        return self

    def worker(self, name: str, *, started: bool = True, limit: int | None = None, **env: str) -> Worker:
        """Start a crew worker; it ends with the pool."""
        worker = Worker(
            self.server,
            self.name,
            kind=self.kind,
            name=name,
            limit=limit,
            folder=self.folder,
            home=self.folder / "home",
            env={
                "PREFECT_WORKER_HEARTBEAT_SECONDS": str(self.heartbeat),
                "PREFECT_INTEGRATIONS_CREW_WORKER_MODULES": f"{USER_FLOWS}, {EXITS}",
                "PREFECT_INTEGRATIONS_CREW_DATABASE_URL": self.database_url,
                "PYTHONPATH": str(IMPORTABLE),
                **env,
            },
        )
        self._open.callback(worker.stop)
        return worker.start() if started else worker

    def deploy(self, name: str, entrypoint: str = RUN_CREW, **options: Any) -> str:
        """Make a deployment for this pool; return its id."""
        flow = self.call("POST", "/flows/", {"name": entrypoint.rpartition(".")[2].replace("_", "-")})
        body = {"name": name, "flow_id": flow["id"], "entrypoint": entrypoint, "work_pool_name": self.name, **options}
        return self.call("POST", "/deployments/", body)["id"]

    def start(self, deployment: str, *, at: datetime | None = None, **parameters: Any) -> str:
        """Make a flow run of a deployment, for now or for a later time; return its id."""
        state: dict[str, Any] = {"type": "SCHEDULED"}
        if at is not None:
            state["state_details"] = {"scheduled_time": at.isoformat()}
        body = {"parameters": parameters, "state": state}
        return self.call("POST", f"/deployments/{deployment}/create_flow_run", body)["id"]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self.seen.flow_run(flow_run_id)

    def wait_for(self, flow_run_id: str, *states: str, name: str | None = None) -> dict[str, Any]:
        """Wait as `wait_for_state` does; `name`: that of the state, if it matters."""
        return wait_for_state(self.seen, flow_run_id, *states, name=name)

    def states(self, flow_run_id: str) -> list[str]:
        return [state["name"] for state in self.history(flow_run_id)]

    def history(self, flow_run_id: str) -> list[dict[str, Any]]:
        """Return a flow run's states, in their order."""
        states = self.call("GET", f"/flow_run_states/?flow_run_id={flow_run_id}")
        return sorted(states, key=lambda state: state["timestamp"])

    def logs(self, *flow_run_ids: str) -> str:
        """Return what a flow run has logged so far, or without one the last lines of all."""
        of_runs: dict[str, Any] = {"logs": {"flow_run_id": {"any_": flow_run_ids}}} if flow_run_ids else {}
        body = {**of_runs, "sort": "TIMESTAMP_ASC" if flow_run_ids else "TIMESTAMP_DESC", "limit": 200}
        return "\n".join(line["message"] for line in self.call("POST", "/logs/filter", body))

    def holders(self) -> dict[str, tuple[str, str]]:
        """Return name and start of the worker that holds a flow run, by the flow runs' ids."""
        with contextlib.closing(sqlite3.connect(self.folder / "crew.db", timeout=LIMIT)) as database:
            query = "SELECT flow_run_id, name, boot FROM crew_held JOIN crew_workers USING (boot)"
            return {flow_run_id: (name, boot) for flow_run_id, name, boot in database.execute(query)}

    def set_state(self, flow_run_id: str, kind: str) -> None:
        """Set a flow run's state as the UI and `prefect flow-run cancel` do."""
        self.call("POST", f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": kind}, "force": False})
