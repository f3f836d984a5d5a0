"""A batch that is cancelled, killed or interrupted: what is stopped, what is left, and how it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.states import Cancelling

from prefect_crew import BatchReport
from prefect_crew.batches.cancel import run_until_cancelled
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import BatchCancelledError
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.held import Held
from support.prefect_server import PrefectServer
from support.processes import Process, ProcessError
from support.scripts import slow

ROWS = [{"topic": str(number)} for number in range(40)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.runs.stop.LOOK_EVERY", 0.2)
    monkeypatch.setattr("prefect_crew.batches.cancel.LOOK_EVERY", 0.2)
    monkeypatch.setattr("prefect_crew.batches.cancel.TICK", 0.2)


async def cancelled(
    batch: Batches, server: Any, name: str, on_cancel: str, rows: Any = ROWS
) -> tuple[BaseException | None, str]:
    """Cancel a batch by its flow run's state while it runs, as the page's button does; return its error and state."""
    found: list[Any] = []

    @flow
    async def mine() -> BatchReport:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        found.append(context.flow_run.id)
        return await batch(server.crew(), rows, name=name, on_cancel=on_cancel, max_in_flight=10)

    running = asyncio.ensure_future(mine())
    while server.kickoffs < 10:
        await asyncio.sleep(0.02)
    async with get_client() as client:
        await client.set_flow_run_state(found[0], Cancelling(), force=True)
        [outcome] = await asyncio.gather(running, return_exceptions=True)
        state = (await client.read_flow_run(found[0])).state
    assert state is not None
    return outcome if isinstance(outcome, BaseException) else None, state.type.value


@pytest.mark.parametrize(
    ("on_cancel", "states"),
    [
        pytest.param("stop", {"stopped"}, id="stop"),
        pytest.param("drain", {"completed"}, id="drain"),
        pytest.param("leave", {"running"}, id="leave"),
    ],
)
async def test_cancelling_stops_kickoffs_at_once_and_goes_on_later(
    batch: Batches, crew_server: CrewServerFactory, on_cancel: str, states: set[str]
):
    held = Held()
    server = crew_server(slow(1.5) if on_cancel == "drain" else held)
    name = f"cancelled {on_cancel}"
    error, state = await cancelled(batch, server, name, on_cancel)
    assert isinstance(error, BatchCancelledError)
    assert state == "CANCELLING", "until the server ends it"
    assert server.kickoffs == 10, "those in flight, and none after"
    assert {str(run.state) for run in server.runs} == states
    held.release()
    report = await batch(server.crew(), ROWS, name=name)
    assert (report.completed, report.failed, report.uncertain) == (40, 0, 0)
    # What we had stopped is started again, the rest is not.
    assert server.kickoffs == 40 + 10 * (on_cancel == "stop")
    assert len(batch.lines()) == 40


async def test_a_batch_whose_rows_were_all_stopped_goes_on_too(batch: Batches, crew_server: CrewServerFactory):
    held = Held()
    server, rows = crew_server(held), ROWS[:10]
    await cancelled(batch, server, "all stopped", "stop", rows)
    held.release()
    report = await batch(server.crew(), rows, name="all stopped")
    assert (report.completed, server.kickoffs) == (10, 20)


class Draining:
    """Rows that end once the batch was looked at twice after it was cancelled; in the place of a runner."""

    def __init__(self) -> None:
        self.waiting: dict[str, Any] = {}
        self.stopped: str | None = None
        self.looks = 0
        self.over = asyncio.Event()

    def stop(self, reason: str) -> None:
        self.stopped = reason

    async def tick(self) -> None:
        self.looks += self.stopped is not None
        if self.looks == 2:
            self.over.set()

    async def rows(self) -> None:
        await self.over.wait()


async def is_cancelled(*_: object, **__: object) -> bool:
    return True


async def test_a_batch_that_drains_is_still_looked_after(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.batches.cancel.is_cancelled", is_cancelled)
    drained = Draining()
    watching = run_until_cancelled(
        drained.rows(), cast("Any", drained), name="drained", on_cancel="drain", tick=drained.tick
    )
    with pytest.raises(BatchCancelledError):
        await asyncio.wait_for(watching, 20)
    assert drained.looks >= 2


@pytest.mark.parametrize("way", ["evicted", "timed out"])
async def test_a_task_that_is_cancelled_leaves_the_runs_in_flight(
    batch: Batches, crew_server: CrewServerFactory, way: str
):
    server = crew_server(slow(4.0))

    async def run() -> None:
        # A timeout of Prefect cancels at every await until its flow is left.
        with scope if way == "timed out" else nullcontext():
            await batch(server.crew(), ROWS, name=way, max_in_flight=10)

    scope = anyio.CancelScope()
    running = asyncio.ensure_future(run())
    while server.kickoffs < 10:
        await asyncio.sleep(0.02)
    if way == "timed out":
        scope.cancel()
        await running
    else:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert {str(run.state) for run in server.runs} == {"running"}
    report = await batch(server.crew(), ROWS, name=way)
    assert (report.completed, report.uncertain, server.kickoffs) == (40, 0, 40)


SCRIPT = """
import sys
from prefect_crew import DeployedCrew, WaitPolicy, run_batch

url, token, name, output = sys.argv[1:5]
report = run_batch(
    DeployedCrew(url=url, token=token),
    [{"topic": str(number)} for number in range(int(sys.argv[5]))],
    name=name, output=output, max_in_flight=20, wait=WaitPolicy(initial=0.05, factor=1),
)
print("REPORT", report.completed, report.failed, report.uncertain, report.kickoffs)
"""


def start(folder: Path, api: PrefectServer, server: CrewServer, name: str, rows: int) -> Process:
    path = folder / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, path, server.url, server.token, name, str(folder / "out.jsonl"), str(rows)]
    return Process(command, log=folder / f"{uuid.uuid4().hex}.log", env=api.env())


def test_ctrl_c_stops_the_runs_in_flight(prefect_api: PrefectServer, tmp_path: Path, crew_server: CrewServerFactory):
    server = crew_server(slow(30))
    with start(tmp_path, prefect_api, server, "interrupted", rows=30) as process:
        while server.kickoffs < 20 and process.running:
            time.sleep(0.01)
        process.send(signal.SIGINT)
        process.wait(30)
    assert {str(run.state) for run in server.runs} == {"stopped"}
    assert server.kickoffs == 20


def test_sigterm_leaves_them(prefect_api: PrefectServer, tmp_path: Path, crew_server: CrewServerFactory):
    server = crew_server(slow(30))
    with start(tmp_path, prefect_api, server, "terminated", rows=30) as process:
        while server.kickoffs < 20 and process.running:
            time.sleep(0.01)
        # Prefect raises it wherever the process happens to be. In a callback or in a write to a socket asyncio takes it
        # for theirs, and it is lost: whoever ends processes sends it again, or kills.
        deadline = time.monotonic() + 60
        while process.running and time.monotonic() < deadline:
            process.send(signal.SIGTERM)
            with contextlib.suppress(ProcessError):
                process.wait(3)
        assert not process.running
    assert {str(run.state) for run in server.runs} == {"running"}
