"""A Prefect server with a project of `prefect-crew init` deployed on it, and flows of flows/ on a process pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.crew_pool import Crews
from support.deployed import ROOT, command
from support.workers import Worker

POOL = "processes"
CREW_POOL = "crews"
FLOWS = """
definitions:
  in_processes: &in_processes
    work_pool: {name: processes, job_variables: {env: {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: "30"}}}
    tags: [recover-crashed]
    schedules: null
deployments:
  - <<: *in_processes
    name: daily
    entrypoint: flows/one_crew.py:one_crew
    parameters: {crew: research, inputs: {topic: tea}}
    schedules:
      - slug: mornings
        active: false
        cron: "0 6 * * *"
        timezone: Europe/Lisbon
        parameters: {idempotency_key: "research-{scheduled_start:%Y-%m-%d}"}
  - <<: *in_processes
    name: weekly
    entrypoint: flows/report_pipeline.py:report_pipeline
    parameters: {topic: tea}
  - <<: *in_processes
    name: by-form
    entrypoint: flows/reviewed_report.py:reviewed_report
    parameters: {topic: tea}
  - <<: *in_processes
    name: after-research
    entrypoint: flows/follow_up.py:follow_up
    parameters: {crew: write, takes: notes, inputs: {topic: tea, audience: everyone}}
    triggers:
      - type: event
        enabled: false
        expect: [crew.completed]
        match: {prefect-crew.crew: research}
        match_related: {prefect.resource.role: flow, prefect.resource.name: one-crew}
        parameters: {idempotency_key: "{{ event.payload.idempotency_key }}", after: research}
"""


class Site(Crews):
    """The project, its crews, and automations. `project` is its folder."""

    def __enter__(self) -> Site:
        for script in (ROOT / "flows" / "crews").glob("*.yaml"):
            self.add_crew(script.stem, str(script), speed=20)
        self.project = self.folder / "project"
        self.run("prefect-crew", "init", self.project)
        self.run("prefect", "work-pool", "create", POOL, "--type", "process")
        self.run("prefect", "work-pool", "create", CREW_POOL, "--type", "crew")
        (self.folder / "flows.yaml").write_text(FLOWS)
        self.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", self.folder / "flows.yaml")
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
        return self._open.enter_context(Worker(self.server, POOL, name=name, folder=self.folder, env=env))

    def deployment(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/deployments/name/{name}")

    def start(self, name: str, parameters: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Start a flow run of a deployment through the API, and return its id."""
        body = {"parameters": dict(parameters or {}), **more}
        return self.call("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"]
