"""One fault and two calls, the second once the fault is over: what is seen are the cells of a row of the tables.

The steps are the same in a simulated world and against real servers; `Ground` is what differs between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew
from prefect_crew.exceptions import CrewError
from prefect_crew.runs.kickoff import open_run
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import stop_run
from prefect_crew.runs.wait import wait_for_run
from prefect_crew.states import CrewState
from support.waiting import until

__all__ = ["REQUEST_TIMEOUT", "TIMEOUT", "Ground", "row"]

T = TypeVar("T")
REQUEST_TIMEOUT = 1.0
"""Seconds: what the tables call a latency of 2 is longer."""
TIMEOUT = 4.0
"""Seconds after which a run that is stuck is given up."""


class Ground(Protocol):
    """Where a row is tried."""

    crew: Crew

    def break_it(self) -> None:
        """Let the fault come from here on."""
        ...

    async def repair_it(self) -> None:
        """Return once the server is up and nothing is on its way any more; from here on it does no wrong."""
        ...

    def started(self) -> int:
        """Return how many runs the server has started."""
        ...

    def state(self, kickoff_id: str) -> CrewState:
        """Return a run's state as the server has it."""
        ...

    async def recorded(self) -> str:
        """Return the phase of the latest record, "nothing" where there is none."""
        ...

    async def run(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step as a process of its own would."""
        ...


async def row(ground: Ground, place: str, idempotency_key: str) -> tuple[str, ...]:
    """Do what a row says and return its cells."""
    if place in ("resume", "stop"):
        return await _act(ground, _answer if place == "resume" else _stop, idempotency_key)
    ground.break_it()
    first = await ground.run(lambda: _call(ground.crew, idempotency_key))
    phase = await ground.recorded()
    await ground.repair_it()
    started = ground.started()
    again = await ground.run(lambda: _call(ground.crew, idempotency_key))
    return first, str(started), phase, again, str(ground.started())


async def open_tea(crew: Crew, idempotency_key: str) -> LiveRun:
    options = RunOptions(idempotency_key=idempotency_key)
    return await open_run(RunRequest.of(crew, Inputs.of({"topic": "tea"}), options))


async def _act(ground: Ground, act: Callable[[Crew, str], Awaitable[str]], idempotency_key: str) -> tuple[str, ...]:
    async def begin() -> str:
        return (await open_tea(ground.crew, idempotency_key)).kickoff_id

    kickoff_id = await ground.run(begin)
    wanted = CrewState.WAITING if act is _answer else CrewState.RUNNING
    await until(lambda: ground.state(kickoff_id) is wanted)
    ground.break_it()
    first = await ground.run(lambda: act(ground.crew, kickoff_id))
    await ground.repair_it()
    state = str(ground.state(kickoff_id))
    again = await ground.run(lambda: act(ground.crew, kickoff_id))
    await asyncio.sleep(0.1)
    return first, state, again, str(ground.state(kickoff_id))


async def _call(crew: Crew, idempotency_key: str) -> str:
    """Run a crew as the two tasks do, without Prefect's retries of the first."""
    try:
        await wait_for_run(await open_tea(crew, idempotency_key))
    except CrewError as error:
        return type(error).__name__
    return "result"


async def _answer(crew: Crew, kickoff_id: str) -> str:
    try:
        await resume_run(LiveRun(crew, kickoff_id), feedback="", approve=True)
    except CrewError as error:
        return type(error).__name__
    return "answered"


async def _stop(crew: Crew, kickoff_id: str) -> str:
    try:
        return str((await stop_run(LiveRun(crew, kickoff_id))).outcome)
    except CrewError as error:
        return type(error).__name__
