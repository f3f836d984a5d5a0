"""A Prefect server with a project of `prefect-crew init` deployed on it, and flows of flows/ on a process pool."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from support.crew_pool import Crews
from support.deployed import ROOT, command
from support.workers import Worker

POOL = "processes"
CREW_POOL = "crews"


class Site(Crews):
    """The project, its crews, and automations. `project` is its folder."""

    def __enter__(self) -> Self:
        for script in (ROOT / "flows" / "crews").glob("*.yaml"):
            self.add_crew(script.stem, str(script), speed=20)
        self.project = self.folder / "project"
        self.run("prefect-crew", "init", self.project)
        self.run("prefect", "work-pool", "create", POOL, "--type", "process")
        self.run("prefect", "work-pool", "create", CREW_POOL, "--type", "crew")
        flows = Path(__file__).with_name("flows.yaml")
        self.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", flows)
        self.deploy()
        self.run("prefect-crew", "automations", "apply", "--pool", POOL)
        return self

    def run(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        """Run a program against the server and return what it wrote."""
        return command(*arguments, env=self.env, cwd=cwd)

    def deploy(self) -> str:
        """Deploy the project, as its README says."""
        return self.run("prefect", "--no-prompt", "deploy", "--all", cwd=self.project)

    def worker(self, name: str, *, env: Mapping[str, str] | None = None) -> Worker:
        """Return a worker of the process pool, started; it is stopped with the site if it still runs then."""
        variables = {"PREFECT_INTEGRATIONS_CREW_DATABASE_URL": self.database_url, **(env or {})}
        return self._open.enter_context(Worker(self.server, POOL, name=name, folder=self.folder, env=variables))

    def deployment(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/deployments/name/{name}")

    def start(self, name: str, parameters: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Start a flow run of a deployment through the API, and return its id."""
        body = {"parameters": dict(parameters or {}), **more}
        return self.call("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"]
