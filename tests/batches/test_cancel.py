"""A batch that is cancelled, killed or interrupted: what is stopped, what is left, and how it goes on."""

import asyncio
import uuid
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import anyio
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling

from prefect_crew import BatchReport, WaitPolicy
from prefect_crew._internal.prefect_api import HeldFlowRun, held_flow_run
from prefect_crew.cli.batch import cancel
from prefect_crew.client import CrewClient
from prefect_crew.client.models import StopAnswer, StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import FlowRunCancelledError
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.held import Held
from support.scripts import slow
from support.waiting import soon, until

ROWS = [{"topic": str(number)} for number in range(40)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.runs.stop.LOOK_EVERY", 0.2)
    monkeypatch.setattr("prefect_crew.batches.runner.LOOK_EVERY", 0.2)
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.2)


async def cancelled(batch: Batches, server: Any, rows: Any, **options: Any) -> tuple[BaseException | None, str]:
    """Cancel a batch by its flow run's state while it runs, as the page's button does; return its error and state."""
    flow_runs: list[Any] = []

    @flow
    async def mine() -> BatchReport:
        flow_runs.append(flow_run.id)
        return await batch(server.crew(), rows, max_in_flight=10, **options)

    running = asyncio.ensure_future(mine())
    await until(lambda: server.kickoffs >= 10, "ten kickoffs")
    async with get_client() as client:
        await client.set_flow_run_state(flow_runs[0], Cancelling(), force=True)
        [outcome] = await asyncio.gather(running, return_exceptions=True)
        state = (await client.read_flow_run(flow_runs[0])).state
    assert state is not None
    return outcome if isinstance(outcome, BaseException) else None, state.type.value


@pytest.mark.parametrize("count", [40, 10])
async def test_cancel_and_go_on(batch: Batches, crew_server: CrewServerFactory, count: int):
    held, rows, name = Held(), ROWS[:count], f"cancelled {count}"
    server = crew_server(held)
    error, state_of_flow = await cancelled(batch, server, rows, name=name)
    assert isinstance(error, FlowRunCancelledError)
    assert state_of_flow == "CANCELLING", "until the server ends it"
    assert server.kickoffs == 10, "those in flight, and none after"
    assert {str(run.state) for run in server.runs} == {"stopped"}
    assert len(batch.lines()) == 10, "it is exported"
    held.release()
    report = await batch(server.crew(), rows, name=name)
    assert report.completed == count
    assert report.failed == 0
    assert report.uncertain == 0
    # What we had stopped is started again, the rest is not.
    assert server.kickoffs == count + 10
    assert len(batch.lines()) == count


async def left(batch: Batches, server: Any, rows: Any, **options: Any) -> None:
    """Leave a batch with ten rows in flight, as Ctrl-C does."""
    running = asyncio.ensure_future(batch(server.crew(), rows, max_in_flight=10, **options))
    await until(lambda: server.kickoffs >= 10, "ten kickoffs")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("answer", ["late", "lost", "requested", "requested by command"])
async def test_a_stopped_row_runs_again(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, answer: str
):
    held, name, by_command = Held(), f"answer {answer}", answer.endswith("command")
    server = crew_server(held, faults=["stop:504-after-accept"] if answer == "lost" else [])
    stop = CrewClient.stop

    async def answered(self: CrewClient, kickoff_id: str) -> StopAnswer:
        answer_of_server = await stop(self, kickoff_id)
        if answer == "late":
            await asyncio.sleep(0.5)  # a poll sees the end first
            return answer_of_server
        return answer_of_server.model_copy(update={"outcome": StopOutcome.REQUESTED, "state": None})

    monkeypatch.setattr(CrewClient, "stop", answered)
    await (left if by_command else cancelled)(batch, server, ROWS[:20], name=name)
    if by_command:
        monkeypatch.setenv("CREW_TOKEN", server.token)
        await cancel(name, crew=server.url)
    assert {str(run.state) for run in server.runs} == {"stopped"}
    held.release()
    report = await batch(server.crew(), ROWS[:20], name=name, breaker=5)
    assert report.completed == 20
    assert report.failed == 0
    assert server.kickoffs == 30


async def test_a_stopped_run_that_is_forgotten_is_not_started_again(batch: Batches, crew_server: CrewServerFactory):
    server, quick = (
        crew_server(Held(), faults=["stop:504-after-accept"]),
        WaitPolicy(grace=0, lost_after=0.5, error_timeout=0.5),
    )
    unseen = WaitPolicy(initial=3600.0, max_interval=3600.0)  # no poll sees the end
    await cancelled(batch, server, ROWS[:20], name="forgotten", wait=unseen)
    server.faults.add("status:forgotten")
    report = await batch(server.crew(), ROWS[:10], name="forgotten", wait=quick)
    assert report.unfinished == 10
    assert dict(report.errors) == {"CrewLostError": 10}
    assert server.kickoffs == 10


async def test_the_command_cancels_the_latest_flow_run(batch: Batches, crew_server: CrewServerFactory):
    """The flow run that started the rows never ends, as that of a killed process; the latest starts nothing."""
    server, phases = crew_server(Held()), list[str]()
    await left(batch, server, ROWS[:10], name="latest")

    @flow
    async def mine() -> BatchReport:
        return await batch(server.crew(), ROWS[:10], name="latest", on_progress=lambda now: phases.append(now.phase))

    running = asyncio.ensure_future(mine())
    await until(lambda: "running" in phases, "the rows are waited for")
    await cancel("latest")
    with pytest.raises(FlowRunCancelledError):
        await soon(running)


@pytest.mark.parametrize("way", ["evicted", "timed out"])
async def test_a_cancelled_task_leaves_its_runs(batch: Batches, crew_server: CrewServerFactory, way: str):
    server = crew_server(slow(4.0))
    call = partial(batch, server.crew(), ROWS, name=f"{way} {uuid.uuid4()}")

    async def run() -> None:
        # A timeout of Prefect cancels at every await until its flow is left.
        with scope if way == "timed out" else nullcontext():
            await call(max_in_flight=10)

    scope = anyio.CancelScope()
    running = asyncio.ensure_future(run())
    await until(lambda: server.kickoffs >= 10, "ten kickoffs")
    if way == "timed out":
        scope.cancel()
        await running
    else:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert {str(run.state) for run in server.runs} == {"running"}
    assert batch.output.exists()
    report = await call()
    assert report.completed == 40
    assert report.uncertain == 0
    assert server.kickoffs == 40


async def test_a_batch_that_outlives_its_flow_run_starts_no_row(batch: Batches, echo: CrewServer):
    held = HeldFlowRun(cast("Any", None), asyncio.get_running_loop())
    held.end("cancelled", "Flow run was cancelled.")

    @flow
    async def mine() -> BatchReport:
        held_flow_run.set(held)
        return await batch(echo.crew(), ROWS[:3])

    with pytest.raises(FlowRunCancelledError):
        await mine()
    assert echo.kickoffs == 0


async def test_a_suspended_flow_run_leaves_rows_and_batch(batch: Batches, crew_server: CrewServerFactory):
    crew, held = Held(), HeldFlowRun(cast("Any", None), asyncio.get_running_loop())
    server = crew_server(crew)

    async def mine() -> BatchReport:
        held_flow_run.set(held)
        return await batch(server.crew(), ROWS[:3], name="left", max_in_flight=2)

    running = asyncio.create_task(mine())
    await until(lambda: server.requests["status"] >= 2, "two rows wait")
    held.end("suspended", "Flow run was suspended.")
    await soon(asyncio.wait({running}))
    assert running.cancelled()
    assert server.kickoffs == 2
    assert server.requests["stop"] == 0
    crew.release()
    report = await batch(server.crew(), ROWS[:3], name="left")
    assert report.completed == 3
    assert server.kickoffs == 3
