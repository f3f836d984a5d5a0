"""A Prefect server with all of deployments/ deployed on it, crews behind it, and workers when they are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from prefect_crew.devserver import CrewServer
from support.deployed import ROOT, command, wait_until
from support.prefect_server import PrefectServer, connected
from support.seen import Seen
from support.workers import Worker

POOL = "processes"
CREW_POOL = "crews"
"""The work pools that deployments/prefect.yaml names."""
YAML = "deployments/prefect.yaml"


class Site:
    """What a user has after the line of docs/guides/examples.md; a context manager that stops its workers and crews.

    Args:
        server: A running Prefect server, used by nothing else.
        folder: For logs and homes.

    Attributes:
        crews: The running crew servers by the names of their blocks: travel, research, write, review.
        seen: What stands on the Prefect server.
    """

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.env = server.env(home=folder / "home")
        self.crews: dict[str, CrewServer] = {}
        self.seen = Seen(server)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Site:
        self._open.callback(self.seen.close)
        for name, spec in {"travel": "travel", **_report()}.items():
            self.add_crew(name, spec, speed=20)
        self.run("prefect", "block", "register", "-m", "prefect_crew")
        self.run("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        self.run("prefect", "work-pool", "create", CREW_POOL, "--type", "crew", "--overwrite")
        self.deploy()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add_crew(self, name: str, spec: Any, **options: Any) -> CrewServer:
        """Start a crew and store it as a block. One of that name from before loses its block, and runs on."""
        crew = self._open.enter_context(CrewServer(spec, **options))
        self.crews[name] = crew
        with connected(self.server, self.folder / "home"):
            block: Any = crew.crew(wait={"initial": 0.1, "max_interval": 0.5})
            block.save(name, overwrite=True, _sync=True)  # whatever kind of test calls it
        return crew

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
        """Return a deployment by `flow/deployment`."""
        return self.call("GET", f"/deployments/name/{name}")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make a request to the Prefect API and return its JSON; None where the answer is empty."""

        def ask() -> httpx.Response | None:
            answer = httpx.request(method, f"{self.server.api_url}{path}", json=body, timeout=30, trust_env=False)
            # SQLite was locked for too long: nothing was done, and Prefect's own client asks again as well.
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

        answer = wait_until(ask, seconds=30, what=f"{method} {path}")
        return answer.raise_for_status().json() if answer.content else None

    def start(self, name: str, parameters: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Start a flow run of a deployment through the API, and return its id."""
        body = {"parameters": dict(parameters or {}), **more}
        return self.call("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"]


def _report() -> dict[str, str]:
    return {path.stem: str(path) for path in sorted((ROOT / "flows" / "crews").glob("*.yaml"))}
