"""Flows that suspend, deployed on a Prefect server of their own with a real process worker."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx

from prefect_crew.server.local import CrewServer
from support.deployed import ROOT, command, wait_until
from support.environment import program
from support.prefect_server import PrefectServer, connected, free_port
from support.processes import Process
from support.seen import Seen
from support.webhooks import SECRET
from support.workers import Worker

__all__ = ["FLOWS", "Asked", "Stage"]

POOL = "suspending"
FLOWS = """
import asyncio
import json
from pathlib import Path

from prefect import flow, runtime, task

from prefect_crew import CrewStep, WaitPolicy, arun_crew, arun_pipeline, kickoff_crew, run_crew, wait_for_crew

HELD = WaitPolicy(initial=0.3, max_interval=1.0)
SUSPEND = WaitPolicy(mode="suspend", initial=0.3, max_interval=1.0)


def kept(result):
    Path(__file__).with_name(f"{runtime.flow_run.id}.json").write_text(json.dumps(result))
    return result


@flow
async def one(crew: str, topic: str, run_key: str | None = None, wait: WaitPolicy = SUSPEND) -> str:
    return kept((await arun_crew(crew, {"topic": topic}, run_key=run_key, wait=wait)).output)


@flow
async def several(crew: str, topics: list[str]) -> list[str]:
    runs = [arun_crew(crew, {"topic": topic}, wait=SUSPEND) for topic in topics]
    return kept([result.output for result in await asyncio.gather(*runs)])


@flow
async def several_with_exceptions(crew: str, topics: list[str]) -> list[str]:
    runs = [arun_crew(crew, {"topic": topic}, wait=SUSPEND) for topic in topics]
    results = await asyncio.gather(*runs, return_exceptions=True)
    return kept([getattr(result, "output", type(result).__name__) for result in results])


@flow
def in_turn(crew: str, topics: list[str]) -> list[str]:
    return kept([run_crew(crew, {"topic": topic}, wait=SUSPEND).output for topic in topics])


@flow
async def by_tasks(crew: str, topic: str) -> str:
    kickoff_id = await kickoff_crew(crew, {"topic": topic})
    return kept((await wait_for_crew(crew, kickoff_id, wait=SUSPEND)).output)


@flow
async def steps(crew: str, topic: str) -> str:
    result = await arun_pipeline(
        [
            CrewStep("left", crew, {"topic": "{{ topic }}"}),
            CrewStep("right", crew, {"topic": "other {{ topic }}"}),
            CrewStep("end", crew, {"topic": "{{ left.output }} and {{ right.output }}"}),
        ],
        {"topic": topic},
        wait=SUSPEND,
    )
    return kept(result["end"].output)


@flow
def reviewed(crew: str, topic: str, run_key: str | None = None, wait: WaitPolicy = SUSPEND) -> str:
    return kept(run_crew(crew, {"topic": topic}, run_key=run_key, wait=wait, review="form").output)


@flow
async def several_reviewed(crew: str, topics: list[str], beside: str | None = None) -> list[str]:
    runs = [arun_crew(crew, {"topic": topic}, wait=SUSPEND, review="form") for topic in topics]
    if beside is not None:
        runs.append(arun_crew(beside, {"topic": "beside"}, wait=SUSPEND))
    return kept([result.output for result in await asyncio.gather(*runs)])


@flow
async def reviewed_beside_work(crew: str, beside: str) -> list[str]:
    runs = [
        arun_crew(crew, {"topic": "tea"}, wait=SUSPEND, review="form"),
        arun_crew(beside, {"topic": "beside"}, wait=HELD),
    ]
    return kept([result.output for result in await asyncio.gather(*runs)])


@task
async def in_a_task(crew: str) -> str:
    return (await arun_crew(crew, {"topic": "in a task"}, wait=SUSPEND)).output


@flow
async def around_a_task(crew: str) -> str:
    return await in_a_task(crew)


@flow
async def around_a_subflow(crew: str) -> str:
    return await one(crew, "in a subflow")


if __name__ == "__main__":
    one.serve(name="served")
"""
YAML = """
name: suspending
pull: [{{prefect.deployments.steps.set_working_directory: {{directory: {folder}}}}}]
deployments:
{deployments}
"""
DEPLOYED = (
    "one", "several", "several_with_exceptions", "in_turn", "by_tasks", "steps", "around_a_task", "around_a_subflow",
    "reviewed", "several_reviewed", "reviewed_beside_work",
)  # fmt: skip


class Asked(NamedTuple):
    """A form that is up: in which state of its flow run, under which pause key, and its text."""

    state: str
    key: str
    text: str


class Stage:
    """A context manager that ends all that it started.

    Args:
        folder: For logs, homes and the flows' file.
        template: A migrated SQLite database for the server.
        hooked: Whether flows have webhooks on, and so a receiver is to be started.
    """

    def __init__(self, folder: Path, template: Path | None = None, *, hooked: bool = False) -> None:
        self.folder = folder
        self.server = PrefectServer(folder / "server", template=template)
        self.receiver_port = free_port()
        self.receiver: Process | None = None
        self.hooks = {"PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET": SECRET} if hooked else {}
        if hooked:
            self.hooks["PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL"] = f"http://127.0.0.1:{self.receiver_port}"
        self.workers: list[Worker] = []
        self._open = contextlib.ExitStack()
        self._receivers = 0

    def __enter__(self) -> Stage:
        try:
            self._open.enter_context(self.server)
            self.env = self.server.env(home=self.folder / "home")
            self.seen = Seen(self.server)
            self._open.callback(self.seen.close)
            self._open.callback(self.stop_receiver)
            (self.folder / "suspending_flows.py").write_text(FLOWS)
            command("prefect", "work-pool", "create", POOL, "--type", "process", env=self.env, cwd=self.folder)
            self._deploy()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _deploy(self) -> None:
        lines = [
            f"  - {{name: it, entrypoint: 'suspending_flows.py:{name}', work_pool: {{name: {POOL}}}, schedules: null}}"
            for name in DEPLOYED
        ]
        path = ROOT / "flows" / "resume_suspended.py"
        lines.append(
            f"  - {{name: it, entrypoint: '{path}:resume_suspended', work_pool: {{name: {POOL}}}, schedules: null}}"
        )
        (self.folder / "prefect.yaml").write_text(YAML.format(folder=self.folder, deployments="\n".join(lines)))
        command("prefect", "--no-prompt", "deploy", "--all", env=self.env, cwd=self.folder)

    def crew(self, name: str, spec: Any, **options: Any) -> CrewServer:
        """Start a crew and store it as a block."""
        crew = self._open.enter_context(CrewServer(spec, **options))
        with connected(self.server, self.folder / "home"):
            block: Any = crew.crew()
            block.save(name, overwrite=True, _sync=True)
        return crew

    def worker(self, name: str = "worker", *, poll: float = 1.0, **env: str) -> Worker:
        """Return a worker, started; it ends with the stage if it still runs then."""
        worker = Worker(self.server, POOL, name=name, folder=self.folder, poll=poll, env={**self.hooks, **env})
        self.workers.append(self._open.enter_context(worker))
        return worker

    @contextlib.contextmanager
    def without_work(self) -> Generator[None]:
        """Give no worker anything to do meanwhile."""
        self.call("PATCH", f"/work_pools/{POOL}", {"is_paused": True})
        try:
            yield
        finally:
            self.call("PATCH", f"/work_pools/{POOL}", {"is_paused": False})

    def start_receiver(self) -> Process:
        """Start `prefect-crew webhooks`, with a log of its own each time."""
        self._receivers += 1
        self.receiver = Process(
            [program("prefect-crew"), "webhooks", "--port", str(self.receiver_port)],
            log=self.folder / f"receiver-{self._receivers}.log",
            env={**self.env, **self.hooks},
        )
        self.receiver.wait_for("Taking webhooks", 60)
        return self.receiver

    def stop_receiver(self) -> None:
        """End it, if it runs."""
        if self.receiver is not None:
            self.receiver.stop()
            self.receiver = None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make a request to the Prefect API and return its JSON; None where the answer is empty."""

        def ask() -> httpx.Response | None:
            answer = httpx.request(method, f"{self.server.api_url}{path}", json=body, timeout=30, trust_env=False)
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

        answer = wait_until(ask, seconds=30, what=f"{method} {path}")
        return answer.raise_for_status().json() if answer.content else None

    def start(self, flow: str, parameters: Mapping[str, Any]) -> str:
        """Start a flow run of a deployment, `flow/it` where no name is given, and return its id."""
        name = flow if "/" in flow else f"{flow.replace('_', '-')}/it"
        deployment = self.call("GET", f"/deployments/name/{name}")["id"]
        return self.call(
            "POST",
            f"/deployments/{deployment}/create_flow_run",
            {"parameters": dict(parameters), "idempotency_key": uuid.uuid4().hex},
        )["id"]

    def sweep(self) -> str:
        """Sweep once, in a process of its own, and return what it said."""
        code = "import asyncio; from prefect_crew.suspending.resuming import sweep; print(dict(asyncio.run(sweep())))"
        return subprocess.run(
            [sys.executable, "-c", code], env=self.env, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    def resume(self, flow_run_id: str) -> Any:
        """Resume a flow run as a person on Prefect's page does."""
        return self.call("POST", f"/flow_runs/{flow_run_id}/resume", {})

    def form(self, flow_run_id: str, *, not_key: str | None = None, seconds: float = 120.0) -> Asked:
        """Wait until a form is up on a flow run's page, another one than that of the pause key."""

        def look() -> Asked | None:
            run = self.seen.flow_run(flow_run_id)
            details = run["state"]["state_details"]
            keyset, key = details.get("run_input_keyset"), details.get("pause_key")
            if run["state_type"] != "PAUSED" or not keyset or key == not_key:
                return None
            text = self._input(flow_run_id, keyset["description"])
            return None if text is None else Asked(run["state_name"], key, text)

        return wait_until(look, seconds=seconds, what=f"a form of flow run {flow_run_id}")

    def _input(self, flow_run_id: str, key: str) -> str | None:
        found = self.call(
            "POST", f"/flow_runs/{flow_run_id}/input/filter", {"prefix": key, "limit": 1, "exclude_keys": []}
        )
        return json.loads(found[0]["value"]) if found else None

    def inputs(self, flow_run_id: str) -> list[str]:
        """Return the names of all that is left of forms."""
        body = {"prefix": "crew-review-", "limit": 200, "exclude_keys": []}
        return [one["key"] for one in self.call("POST", f"/flow_runs/{flow_run_id}/input/filter", body)]

    def fill_in(self, flow_run_id: str, **fields: str) -> str:
        """Submit the form as Prefect's page does, and return what Prefect makes of it."""
        return self.call("POST", f"/flow_runs/{flow_run_id}/resume", {"run_input": fields})["status"]

    def wait_for(self, flow_run_id: str, *names: str, seconds: float = 90.0) -> dict[str, Any]:
        """Wait until a flow run is in a state of one of these names, and return it."""

        def look() -> dict[str, Any] | None:
            run = self.seen.flow_run(flow_run_id)
            return run if run["state_name"] in names else None

        return wait_until(look, seconds=seconds, what=f"flow run {flow_run_id} in {names}")

    def result_of(self, flow_run_id: str) -> Any:
        """Return what a flow run has returned."""
        return json.loads((self.folder / f"{flow_run_id}.json").read_text())

    def notes(self) -> list[str]:
        """Return the names of all notes of who is suspended for what."""
        body = {"variables": {"name": {"like_": "crew_suspended_%"}}, "limit": 200}
        return [variable["name"] for variable in self.call("POST", "/variables/filter", body)]
