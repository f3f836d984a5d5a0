"""What tests that start a dev server share."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_crew.devserver import CrewServer, Fault, Program, Run
from prefect_crew.devserver._response_formats import Documented, Live
from support.waiting import LIMIT, wait_until

Serve = Callable[..., tuple[CrewServer, httpx.Client]]
"""Starts a server, as CrewServer does, and opens a plain HTTP client with its token: the fixture `serve`."""


@dataclass(frozen=True)
class _RandomFault(Fault):
    chance: float = 1.0
    seed: str = ""

    def hits(self, occurrence: int) -> bool:
        # A generator of its own per occurrence, so that what other faults and other requests do changes nothing.
        return super().hits(occurrence) and random.Random(f"{self.seed}:{occurrence}").random() < self.chance


def at_random(*texts: str, seed: int) -> list[Fault]:
    """Return faults from texts such as `status:500%0.1`: one in ten, at random, the same ones for the same seed.

    A text without a chance is a fault as it stands.
    """
    faults: list[Fault] = []
    for index, text in enumerate(texts):
        text, _, chance = text.partition("%")
        fault = Fault.parse(text)
        if chance:
            more = {"chance": float(chance), "seed": f"{seed}:{index}"}
            fault = _RandomFault(fault.where, fault.name, fault.on, fault.value, **more)  # pyright: ignore[reportArgumentType]
        faults.append(fault)
    return faults


class _Describing(Documented):
    def inputs(self, program: Program) -> dict[str, Any]:
        return {"inputs": [item.model_dump(exclude_none=True) for item in program.inputs()]}


class _Adding(Live):
    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def status(self, run: Run) -> dict[str, Any]:
        return super().status(run) | self.facts


def adding(server: CrewServer, **facts: Any) -> CrewServer:
    """Let the status of a server, in the live format, have more facts."""
    server._format = _Adding(**facts)
    return server


class _Hiding(Documented):
    def __init__(self, *names: str) -> None:
        self.names = names

    def status(self, run: Run) -> dict[str, Any]:
        return {name: part for name, part in super().status(run).items() if name not in self.names}


def describing(server: CrewServer) -> CrewServer:
    """Let a server describe each of its inputs, as some in the field do."""
    server._format = _Describing()
    return server


def nameless(server: CrewServer) -> CrewServer:
    """Let the status of a server not say which task runs or waits."""
    server._format = _Hiding("current_task", "task_output")
    return server


class Crews(CrewServer):
    """Several crews on one port, each under its name. They share the token, the faults, and what is counted."""

    def __init__(self, specs: Mapping[str, str], *, token: str) -> None:
        super().__init__(token=token)
        self.crews = {name: CrewServer(spec, token=token) for name, spec in specs.items()}
        for crew in self.crews.values():
            crew.faults, crew.requests, crew.accepted = self.faults, self.requests, self.accepted
        self.asgi = Starlette(routes=[Mount(f"/{name}", crew.asgi) for name, crew in self.crews.items()])

    @property
    def runs(self) -> list[Run]:
        return [run for crew in self.crews.values() for run in crew.runs]


def let_requests_end(server: CrewServer) -> None:
    """Return once the server has received what dead and cancelled callers sent before, and has answered it."""
    # The server accepts connections in their order, so it has those of the dead once it answers a new one.
    httpx.get(f"{server.url}/inputs", headers=server.headers, timeout=LIMIT)
    web = server._web  # pyright: ignore[reportPrivateUsage]
    assert web is not None
    wait_until(lambda: not web.server_state.tasks, "the end of all requests")


def kickoff(client: httpx.Client, inputs: dict[str, Any] | None = None, **more: Any) -> str:
    """Start a run and return its kickoff id; `more` is the rest of the body."""
    answer = client.post("/kickoff", json={"inputs": inputs or {}, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["kickoff_id"]


def finished(client: httpx.Client, kickoff_id: str) -> dict[str, Any]:
    """Poll a run until it has ended or waits for a person, and return the last status body."""

    def body() -> dict[str, Any] | None:
        body = client.get(f"/status/{kickoff_id}").json()
        is_over = str(body.get("state") or body["status"]).upper() not in ("RUNNING", "STARTED", "PENDING")
        return body if is_over else None

    return wait_until(body, f"the end of run {kickoff_id}")
