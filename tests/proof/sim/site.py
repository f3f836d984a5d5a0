"""The crew's side of a simulated world: the real local crew server on the simulated clock, and what its crew does."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import Answer, Outcome, ProgramError, Run
from prefect_crew.devserver._faults import Fired
from proof.sim.loop import Process, current_process
from proof.sim.prefect_api import SimPrefect
from proof.sim.scenario import CrewRun, Scenario
from proof.sim.transport import InProcessTransport
from support.crash import CrashingServer

__all__ = ["HOST", "TOKENS", "CrewSite"]

HOST = "crew.sim.test"
TOKENS = ("first-token", "second-token")


@dataclass
class _Crew:
    """The crew's program."""

    runs: tuple[CrewRun, ...]
    name: str = "simulated"
    unanswered: bool = False
    order: list[str] = field(default_factory=list[str])

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="topic")]

    def plan_of(self, run_id: str) -> CrewRun:
        """Return what a run does; the same after a restart of the server."""
        if run_id not in self.order:
            self.order.append(run_id)
        number = self.order.index(run_id)
        return self.runs[number] if number < len(self.runs) else CrewRun()

    async def execute(self, run: Run) -> Outcome:
        plan = self.plan_of(run.id)
        await asyncio.sleep(plan.seconds)
        if plan.end == "stuck":
            await asyncio.get_running_loop().create_future()
        if plan.end == "asks":
            if not self.unanswered:
                asyncio.get_running_loop().call_later(max(plan.seconds, 1.0), _approve, run)
            await run.ask(task_id="review", output="Well?")
        if plan.end == "fails":
            raise ProgramError("it was asked to fail")
        return Outcome(f"{run.inputs['topic']} by {run.id}")


def _approve(run: Any) -> None:
    if "review" in run.questions:
        run.answer("review", Answer(approve=True, feedback=""))


class _Counting(InProcessTransport):
    """Notes who makes each request, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, Process | None]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((asyncio.get_running_loop().time(), current_process()))
        return await super().handle_async_request(request)


class _Noted(list[Fired]):
    """A list that tells of what is added to it."""

    def __init__(self, note: Callable[[Fired], None]) -> None:
        super().__init__()
        self._note = note

    def append(self, fired: Fired) -> None:
        self._note(fired)
        super().append(fired)


class _Accepted(dict[str, Any]):
    """The accepted kickoffs, with the moment of each."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, float] = {}

    def __setitem__(self, id_: str, meta: Any) -> None:
        self.at[id_] = asyncio.get_running_loop().time()
        super().__setitem__(id_, meta)


class CrewSite:
    """The server, with what it was asked. `stored_token` is what the block on the Prefect server holds.

    `attempts` returns the attempts on record at a key;
    `accepted_at` and `ended_at` are when each run began and ended, in seconds since the scenario began;
    `kickoff_faults` are those that came, with the moment and the idempotency key of the kickoff; `same_ids` are the
    keys of kickoffs that were answered with the id of another one, and started nothing; `stop_asked` are the runs that
    somebody asked to stop.
    """

    def __init__(self, scenario: Scenario, prefect: SimPrefect) -> None:
        self.program = _Crew(scenario.runs)
        self.token = self.stored_token = TOKENS[0]
        self._state: Any = CrashingServer(self.program, token=self.token, faults=scenario.faults)
        self._app = self._state.asgi
        self._state.crash = self._crash
        self.faults = self._state.faults
        self.counters = self._state
        self.counters.accepted = accepted = _Accepted()
        self.accepted_at = accepted.at
        self.ended_at: dict[str, float] = {}
        self.transport = _Counting()
        self.crashes = 0
        self.unclaimed: list[str] = []
        self.kickoff_faults: list[tuple[float, str, Fired]] = []
        self.faults.fired = _Noted(self._note_fault)
        self._arriving = ""
        self.same_id_for = scenario.same_id_for
        self._first: tuple[asyncio.Future[list[Any]], float] | None = None
        self.same_ids: list[str] = []
        self.stop_asked: list[str] = []
        self.attempts: Callable[[str], list[dict[str, Any]]] = prefect.records
        self._scenario = scenario
        self._prefect = prefect

    @property
    def runs(self) -> list[Run]:
        """What the server knows."""
        return self._state.runs

    def run(self, kickoff_id: str) -> Run | None:
        """Return a run that the server knows."""
        return next((run for run in self.runs if run.id == kickoff_id), None)

    def accepted(self, idempotency_key: str) -> list[str]:
        """Return the ids of all runs that were ever started under an idempotency key."""
        return [id_ for id_, meta in self.counters.accepted.items() if meta["idempotency_key"] == idempotency_key]

    def noting_end(self, end: Callable[..., None]) -> Callable[..., None]:
        """Return `Run.end`, with a note of the moment."""

        @functools.wraps(end)
        def noted(run: Run, *args: Any, **kwargs: Any) -> None:
            if not run.state.ended:
                self.ended_at[run.id] = asyncio.get_running_loop().time()
            end(run, *args, **kwargs)

        return noted

    async def open(self) -> None:
        """Start the server, for the first time or after a crash; schedule the rotation of its token."""
        self._state.open()
        self.transport.open(self._spy)
        if self.crashes == 0 and self._scenario.rotate_at is not None:
            asyncio.get_running_loop().call_later(self._scenario.rotate_at, self._rotate)

    def close(self) -> None:
        """End it for good."""
        self._state.abandon()
        self.transport.crash()

    async def _spy(self, scope: Any, receive: Any, send: Any) -> None:
        """Look whether each kickoff that arrives has a claim on the Prefect server."""
        if scope["path"].startswith("/stop/"):
            self.stop_asked.append(scope["path"].rpartition("/")[2])
        if scope["path"] != "/kickoff":
            await self._app(scope, receive, send)
            return
        message = await receive()
        key = json.loads(message["body"])["meta"]["idempotency_key"]
        if not any(record["phase"] == "claimed" and record.get("entries", 1) for record in self.attempts(key)):
            self.unclaimed.append(key)
        self._arriving = key
        given = iter((message,))

        async def again() -> Any:
            return next(given, None) or await receive()

        if (answer := self._repeated_answer()) is None:
            await self._app(scope, again, self._noting_answer(send))
            return
        self.same_ids.append(key)
        for part in await answer:
            await send(part)

    def _repeated_answer(self) -> asyncio.Future[list[Any]] | None:
        """Return the answer to an earlier kickoff, which a proxy gives to this one; None if this one is passed on."""
        loop = asyncio.get_running_loop()
        first, at = self._first or (None, 0.0)
        if first is not None and loop.time() < at + self.same_id_for:
            return first
        self._first = (loop.create_future(), loop.time())
        return None

    def _noting_answer(self, send: Any) -> Any:
        parts: list[Any] = []
        answer = None if self._first is None else self._first[0]

        async def noted(part: Any) -> None:
            parts.append(part)
            if part["type"] == "http.response.body" and not part.get("more_body") and answer and not answer.done():
                answer.set_result(parts)
            await send(part)

        return noted

    def _note_fault(self, fired: Fired) -> None:
        # It is drawn as soon as the request has arrived.
        if fired.where == "kickoff":
            self.kickoff_faults.append((asyncio.get_running_loop().time(), self._arriving, fired))

    def _crash(self) -> None:
        loop = asyncio.get_running_loop()
        self.crashes += 1
        self._state.abandon()
        self.transport.crash()
        loop.call_later(self._scenario.down_for, lambda: loop.create_task(self.open()))

    def _rotate(self) -> None:
        self.token = self._state.token = TOKENS[1]
        asyncio.get_running_loop().call_later(self._scenario.rotate_late, setattr, self, "stored_token", TOKENS[1])
