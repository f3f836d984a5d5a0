"""Waiting for the runs of rows: late ones, lost ones, and those that ask people, who answer once a round."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import flow

from prefect_crew import CrewError, DeployedCrew, Review, WaitPolicy, arun_batch, resume_crew
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.runner import FirstPoll
from prefect_crew.batches.stored import batches_waiting_for_people
from prefect_crew.exceptions import AnsweredError
from prefect_crew.records.model import RunRecord, StoredResult
from prefect_crew.runs.reviews.answer import answer_run, find_run_in_flight, resume_run
from prefect_crew.runs.run import OpenRun
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.asking import AskingServer
from support.batches import Batches
from support.scripts import script, slow
from support.webhooks import served

pytestmark = pytest.mark.usefixtures("prefect_api")
WAIT = WaitPolicy(initial=0.1, factor=1, max_interval=0.1, jitter=0)
APPROVED = Review(approve=True)


@dataclass
class Row:
    server: AskingServer
    crew: DeployedCrew
    ledger: Path

    @property
    def kickoff_id(self) -> str:
        return f"asking-{id(self.server)}"

    async def approve(self) -> None:
        """Answer it as `prefect-crew reviews approve` does."""
        async with batches_waiting_for_people() as (batches, _):
            record, ledger = await find_run_in_flight(self.kickoff_id, [batch.ledger for batch in batches])
            await answer_run(OpenRun(self.crew.crew, self.kickoff_id, record), ledger, APPROVED, by="Ada")

    async def approve_in_a_flow(self) -> None:
        crew, kickoff_id = self.crew, self.kickoff_id

        @flow
        async def answering() -> None:
            await resume_crew(crew, kickoff_id, approve=True)

        await answering()

    async def approve_in_python(self) -> None:
        await resume_run(self.crew.crew, self.kickoff_id, feedback="", approve=True)


@asynccontextmanager
async def waiting_row(folder: Path) -> AsyncIterator[Row]:
    """Run a batch of one row, whose crew still shows its question long after it was answered."""
    server, name = AskingServer(lag=100_000), f"asked {uuid.uuid4().hex[:8]}"
    output = folder / f"{name}.jsonl"
    async with served(server.app()) as url:
        crew = DeployedCrew(url=url, token="secret-token")
        running = asyncio.create_task(
            arun_batch(crew, [{"id": "one"}], name=name, key="id", inputs={}, output=str(output), wait=WAIT)
        )
        try:
            async with asyncio.timeout(60):
                while not await _asks(name):
                    assert not running.done(), running.result()
                    await asyncio.sleep(0.1)
            yield Row(server, crew, Path(f"{output}.ledger.db"))
        finally:
            running.cancel()
            await asyncio.wait({running})


async def _asks(name: str) -> bool:
    async with batches_waiting_for_people() as (batches, _):
        return name in [batch.name for batch in batches]


async def test_a_row_is_answered_once(tmp_path: Path) -> None:
    async with waiting_row(tmp_path) as row:
        await row.approve()
        with pytest.raises(AnsweredError, match="was already answered"):
            await row.approve()
        assert len(row.server.resumes) == 1


@pytest.mark.parametrize("way", [Row.approve_in_a_flow, Row.approve_in_python])
async def test_without_the_ledger_the_message_says_how_to_answer_a_row(
    tmp_path: Path, way: Callable[[Row], Awaitable[None]]
) -> None:
    async with waiting_row(tmp_path) as row:
        with pytest.raises(CrewError, match=r"nothing was sent\. Answer a row with prefect-crew reviews approve"):
            await way(row)
        assert row.server.resumes == []
        another = AskingServer()
        async with served(another.app()) as url:
            crew = DeployedCrew(url=url, token="secret-token")
            async with crew.client() as client:
                kickoff_id = await client.kickoff({})
            await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        assert len(another.resumes) == 1, "a batch of another crew is not an obstacle"


# Runs that are late, lost, or hard to see


async def test_a_row_over_its_time_is_left_or_stopped(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(slow(30))
    rows = [{"topic": str(number)} for number in range(3)]
    policy = WaitPolicy(initial=0.05, timeout=0.3)
    report = await batch(server.crew(), rows, name="late", wait=policy)
    assert (report.failed, dict(report.errors)) == (3, {"CrewTimeoutError": 3})
    assert {line["state"] for line in batch.lines().values()} == {"timed-out"}
    assert {str(run.state) for run in server.runs} == {"running"}
    strict = WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop")
    report = await batch(server.crew(), rows, name="late", wait=strict)
    assert server.kickoffs == 3, "they were in flight"
    assert {str(run.state) for run in server.runs} == {"stopped"}
    report = await batch(server.crew(), rows, name="late")
    assert (report.failed, {line["state"] for line in batch.lines().values()}) == (3, {"stopped"})


async def test_a_run_that_the_server_forgets_is_lost_and_started_again_only_by_its_key(
    batch: Batches, crew_server: CrewServerFactory
):
    server = crew_server(slow(0.2), faults=["status:forgotten@2"])
    rows = [{"topic": str(number)} for number in range(3)]
    quick = WaitPolicy(initial=0.05, factor=1, grace=0.1)
    report = await batch(server.crew(), rows, name="lost", wait=quick, max_in_flight=1)
    assert (report.completed, dict(report.errors)) == (2, {"CrewLostError": 1})
    [key] = [key for key, line in batch.lines().items() if line["state"] == "lost"]
    report = await batch(server.crew(), rows, name="lost", wait=quick, retry_failed=True)
    assert (report.completed, server.kickoffs) == (2, 3)
    report = await batch(server.crew(), rows, name="lost", wait=quick, retry_failed=[key])
    assert (report.completed, server.kickoffs) == (3, 4)


async def test_a_person_that_a_row_waits_for_is_not_timed_out(batch: Batches, crew_server: CrewServerFactory):
    asks = script({"name": "draft", "output": "a draft", "human": True}, {"output": "printed"}, inputs=["topic"])
    server = crew_server(asks)
    crew = server.crew()
    wait = WaitPolicy(initial=0.05, factor=1, timeout=0.5)
    running = asyncio.ensure_future(batch(crew, [{"topic": "tea"}, {"topic": "milk"}], name="people", wait=wait))
    while sum(str(run.state) == "waiting" for run in server.runs) < 2:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.8)
    async with crew.client() as client:
        for run in server.runs:
            await client.resume(run.id, "draft", "fine", True)
    report = await running
    assert report.ok
    async with Ledger(f"{batch.output}.ledger.db", "people") as ledger:
        records = [row.record async for row in ledger.rows_in([RowState.COMPLETED]) if row.record is not None]
    assert all(record.human_seconds > 0.5 and record.state is CrewState.COMPLETED for record in records)


async def test_the_first_poll_comes_when_the_fastest_tenth_of_runs_has_ended():
    times = FirstPoll()

    def add(seconds: float) -> None:
        times.add(RunRecord.model_construct(result=StoredResult(output="", execution_time=seconds)))

    assert times.seconds == 0
    for seconds in range(100, 120):
        add(float(seconds))
    assert 100 <= times.seconds <= 102
    for _ in range(200):
        add(5.0)
    assert times.seconds == 5.0
