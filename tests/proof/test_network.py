"""The network matrix: faults.md says what comes of every fault, and here each row of it is tried.

In a simulated world each time, where a second costs nothing; with `make prove`, or where the seed chooses it, against a
real crew server on a port and a real Prefect server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from prefect_crew.blocks import crew_of
from prefect_crew.crew import WaitPolicy, fast_polling
from prefect_crew.devserver._faults import FAULTS
from prefect_crew.records.store import PrefectRecords
from prefect_crew.states import CrewState
from proof.network import REQUEST_TIMEOUT, TIMEOUT, row
from proof.sim.scenario import Call, CrewRun, Scenario
from proof.sim.world import World, key_of
from proof.tables import Case, cases
from support.crash import CrashingServer
from support.scripts import script

T = TypeVar("T")
POLICY = WaitPolicy(
    initial=0.1, max_interval=0.1, timeout=TIMEOUT, human_timeout=TIMEOUT, error_timeout=30, grace=2, lost_after=2
)


def test_the_tables_name_every_fault_of_every_place() -> None:
    named: dict[str, set[str]] = {}
    for case in cases():
        named.setdefault(case.place, set()).add(case.fault.partition("=")[0])
    for place, names in named.items():
        expected = set[str]()
        for name, kind in FAULTS.items():
            if place in kind.places:
                # For a request that changes nothing, it makes no difference when the answer is spoilt.
                twice = kind.has_phases and place in ("kickoff", "resume", "stop")
                expected |= {f"{name}-before-accept", f"{name}-after-accept"} if twice else {name}
        assert names == expected, place
    assert set(named) == {"kickoff", "inputs", "status", "resume", "stop"}


class SimulatedGround(World):
    """A simulated world with one row in it."""

    def __init__(self, case: Case) -> None:
        end = {"resume": "asks", "stop": "stuck"}.get(case.place, "completes")
        plan = CrewRun(end=end, seconds=0.5)  # pyright: ignore[reportArgumentType]
        super().__init__(Scenario(calls=(Call(),), runs=(plan,), faults=(case.text,), down_for=0.5))
        self.site.faults.clear()
        self.site.program.unanswered = True
        self.case = case
        self.cells: tuple[str, ...] = ()
        self.crew = replace(self.crew, request_timeout=REQUEST_TIMEOUT, wait=POLICY)

    def break_it(self) -> None:
        self.site.faults.add(self.case.text)

    async def repair_it(self) -> None:
        await asyncio.sleep(5)
        self.site.faults.clear()

    def started(self) -> int:
        return self.site.counters.kickoffs

    def state(self, kickoff_id: str) -> CrewState:
        run = self.site.run(kickoff_id)
        assert run is not None
        return run.state

    async def recorded(self) -> str:
        records = self.prefect.records(key_of(0))
        return records[-1]["phase"] if records else "nothing"

    async def run(self, step: Callable[[], Awaitable[T]]) -> T:
        said: list[T] = []

        async def main() -> None:
            said.append(await step())

        await self.process(f"step {len(self.processes)}", Call()).start(main())
        return said[0]

    async def _course(self) -> None:
        await self.site.open()
        self.cells = await row(self, self.case.place, key_of(0))
        await self._bury()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_comes_of_a_fault(case: Case) -> None:
    ground = SimulatedGround(case)
    ground.play()
    assert ground.cells == case.expected, "\n".join(ground.trace)


class RealGround:
    """A real crew server on a port, and the Prefect server of the session."""

    def __init__(self, case: Case, server: CrashingServer, idempotency_key: str) -> None:
        self.case = case
        self.server = server
        self.idempotency_key = idempotency_key
        self.crew = crew_of(server.crew(request_timeout=REQUEST_TIMEOUT, wait=POLICY))
        self.restarted = threading.Event()

    def break_it(self) -> None:
        self.server.faults.add(self.case.text)

    async def repair_it(self) -> None:
        # The longest fault takes two seconds.
        late = "latency" in self.case.fault
        await asyncio.sleep(2.2 if late else 0.2)
        if "crash" in self.case.fault:
            await asyncio.to_thread(self.restarted.wait, 10)
            await asyncio.sleep(1.0)  # what was in flight begins again
        self.server.faults.clear()

    def started(self) -> int:
        return self.server.kickoffs

    def state(self, kickoff_id: str) -> CrewState:
        return self.server.run(kickoff_id).state

    async def recorded(self) -> str:
        attempts = await PrefectRecords().attempts(self.idempotency_key)
        return str(attempts[-1].phase) if attempts else "nothing"

    async def run(self, step: Callable[[], Awaitable[T]]) -> T:
        return await step()


@contextmanager
def restarting(ground: RealGround) -> Iterator[None]:
    """Bring the server back half a second after it has crashed."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if ground.server.crashed.wait(0.1) and not over.wait(0.5):
                ground.server.restart()
                ground.restarted.set()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


SCRIPTS: dict[str, dict[str, Any]] = {"resume": {"human": True}, "stop": {"seconds": 600}}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_comes_of_a_fault_for_real(case: Case, idempotency_key: str) -> None:
    crew = script({"seconds": 0.5, "output": "done", **SCRIPTS.get(case.place, {})}, inputs=["topic"])
    with CrashingServer(crew) as server:
        ground = RealGround(case, server, idempotency_key)
        with restarting(ground), fast_polling(0.1):
            assert asyncio.run(row(ground, case.place, idempotency_key)) == case.expected
