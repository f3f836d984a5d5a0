"""A Prefect server with all of deployments/ deployed on it, crews behind it, and workers when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.crew_pool import Crews
from support.deployed import ROOT, command
from support.workers import Worker

POOL = "processes"
CREW_POOL = "crews"
"""The work pools that deployments/prefect.yaml names."""
YAML = "deployments/prefect.yaml"


class Site(Crews):
    """What a user has after the line of deployments/README.md: the crews travel, research, write and review."""

    def __enter__(self) -> Site:
        for name, spec in {"travel": "travel", **_report()}.items():
            self.add_crew(name, spec, speed=20)
        self.run("prefect", "block", "register", "-m", "prefect_crew")
        self.run("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        self.run("prefect", "work-pool", "create", CREW_POOL, "--type", "crew", "--overwrite")
        self.deploy()
        return self

    def run(self, *arguments: str | Path) -> str:
        """Run a program against the server, from the root of the repository; return what it wrote."""
        return command(*arguments, env=self.env, cwd=ROOT)

    def deploy(self) -> str:
        """Deploy everything, and set the automations up, as the docs say."""
        said = self.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", YAML)
        return said + self.run("prefect-crew", "automations", "apply", "--pool", POOL)

    def worker(self, name: str, *, env: Mapping[str, str] | None = None) -> Worker:
        """Return a worker of the pool, started; it is stopped with the site if it still runs then."""
        return self._open.enter_context(Worker(self.server, POOL, name=name, folder=self.folder, env=env))

    def deployment(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/deployments/name/{name}")

    def start(self, name: str, parameters: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Start a flow run of a deployment through the API, and return its id."""
        body = {"parameters": dict(parameters or {}), **more}
        return self.call("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"]


def _report() -> dict[str, str]:
    return {path.stem: str(path) for path in sorted((ROOT / "flows" / "crews").glob("*.yaml"))}
