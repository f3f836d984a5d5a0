"""The network matrix: faults.md says what comes of every fault, and here each row of it is tried.

One fault and two calls, the second once the fault is over, against a real crew server on a port and a real Prefect
server. Each time the first fault of each row; `make prove` tries all of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import WaitPolicy, fast_polling
from prefect_crew.devserver._faults import FAULTS
from prefect_crew.exceptions import CrewAPIError, CrewError
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.start import open_run
from prefect_crew.runs.stop import stop_run
from prefect_crew.runs.wait import wait_for_run
from prefect_crew.states import CrewState
from proof.resolve import attempts_of
from proof.tables import Case, cases
from support.crash import CrashingServer
from support.scripts import script
from support.servers import let_requests_end
from support.waiting import until

REQUEST_TIMEOUT = 1.0
"""Seconds: what the tables call a latency of 2 is longer."""
TIMEOUT = 4.0
"""Seconds after which a run that is stuck is given up."""
POLICY = WaitPolicy(
    initial=0.1, max_interval=0.1, timeout=TIMEOUT, human_timeout=TIMEOUT, error_timeout=30, grace=2, lost_after=2
)
SCRIPTS: dict[str, dict[str, Any]] = {"resume": {"human": True}, "stop": {"seconds": 600}}


def test_the_tables_name_every_fault_of_every_place() -> None:
    named: dict[str, set[str]] = {}
    for case in cases():
        named.setdefault(case.place, set()).add(case.fault.partition("=")[0])
    for place, names in named.items():
        expected = set[str]()
        for name, kind in FAULTS.items():
            if place in kind.places and name != "hold":  # held and let go, it is one that took long: `latency`
                # For a request that changes nothing, it makes no difference when the answer is spoilt.
                twice = kind.has_phases and place in ("kickoff", "resume", "stop")
                expected |= {f"{name}-before-accept", f"{name}-after-accept"} if twice else {name}
        assert names == expected, place
    assert set(named) == {"kickoff", "inputs", "status", "resume", "stop"}


class Ground:
    """A crew's server, and those who call it. The cells of a row are what is seen of them."""

    def __init__(self, case: Case, server: CrashingServer, idempotency_key: str) -> None:
        self.case, self.server, self.key = case, server, idempotency_key
        self.crew = crew_of(server.crew(request_timeout=REQUEST_TIMEOUT, wait=POLICY))
        self.restarted = threading.Event()

    @contextmanager
    def restarting(self) -> Iterator[None]:
        """Bring the server back half a second after it has crashed."""
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if self.server.crashed.wait(0.1) and not over.wait(0.5):
                    self.server.restart()
                    self.restarted.set()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    async def repair(self) -> None:
        """Return once the server is up and nothing is on its way any more; from here on it does no wrong."""
        if "crash" in self.case.fault:
            await until(self.restarted.is_set, "the server's return")
        self.server.faults.clear()
        await asyncio.to_thread(let_requests_end, self.server)

    async def cells(self) -> tuple[str, ...]:
        """Do what the row says and return its cells."""
        if self.case.place in ("resume", "stop"):
            return await self._acts()
        self.server.faults.add(self.case.text)
        first = await self._call()
        found = await asyncio.to_thread(attempts_of, self.key)
        await self.repair()
        started = self.server.kickoffs
        again = await self._call()
        return first, str(started), str(found[-1].state) if found else "nothing", again, str(self.server.kickoffs)

    async def _acts(self) -> tuple[str, ...]:
        act = self._answer if self.case.place == "resume" else self._stop
        kickoff_id = (await self._open()).kickoff_id
        wanted = CrewState.WAITING if self.case.place == "resume" else CrewState.RUNNING
        await until(lambda: self.server.run(kickoff_id).state is wanted)
        self.server.faults.add(self.case.text)
        first = await act(kickoff_id)
        await self.repair()
        if "crash" in self.case.fault:  # the run begins again
            await until(lambda: self.server.run(kickoff_id).state in (wanted, CrewState.STOPPED))
        state = str(self.server.run(kickoff_id).state)
        again = await act(kickoff_id)
        await asyncio.sleep(0.1)
        return first, state, again, str(self.server.run(kickoff_id).state)

    async def _open(self) -> LiveRun:
        options = RunOptions(idempotency_key=self.key)
        return await open_run(RunRequest.of(self.crew, Inputs.of({"topic": "tea"}), options))

    async def _call(self) -> str:
        """Run a crew as the two tasks do, without Prefect's retries of the first."""
        try:
            await wait_for_run(await self._open())
        except CrewError as error:
            return name_of(error)
        return "result"

    async def _answer(self, kickoff_id: str) -> str:
        try:
            await resume_run(LiveRun(self.crew, kickoff_id), feedback="", approve=True)
        except CrewError as error:
            return name_of(error)
        return "answered"

    async def _stop(self, kickoff_id: str) -> str:
        try:
            return str((await stop_run(LiveRun(self.crew, kickoff_id))).outcome)
        except CrewError as error:
            return name_of(error)


def name_of(error: CrewError) -> str:
    """Return the class of an error, with the status where it tells what to do."""
    status = error.status_code if type(error) is CrewAPIError else 0
    return f"{type(error).__name__} {'5xx' if status >= 500 else status if status in (404, 429) else ''}".strip()


def each() -> Iterator[Any]:
    """Yield each case: the first of each row as a quick test, but those at the kickoff that a scenario has."""
    rows = set[tuple[str, ...]]()
    for case in cases():
        is_quick = (case.place, *case.expected) not in rows and case.place in ("inputs", "status", "resume")
        rows.add((case.place, *case.expected))
        yield pytest.param(case, id=str(case), marks=() if is_quick else pytest.mark.slow)


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("case", [*each()])
def test_what_comes_of_a_fault(case: Case, idempotency_key: str) -> None:
    crew = script({"seconds": 0.5, "output": "done", **SCRIPTS.get(case.place, {})}, inputs=["topic"])
    with CrashingServer(crew) as server:
        ground = Ground(case, server, idempotency_key)
        with ground.restarting(), fast_polling(0.1):
            assert asyncio.run(ground.cells()) == case.expected
