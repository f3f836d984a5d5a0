"""A row of a batch is answered once a round, also by whoever has no more than its kickoff id."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import flow

from prefect_crew import CrewError, DeployedCrew, Review, WaitPolicy, arun_batch, resume_crew
from prefect_crew.batches.stored import asking_batches
from prefect_crew.exceptions import AnsweredError
from prefect_crew.runs.reviews.inbox import answer_run, find_run_in_flight, resume_run
from support.asking import AskingServer
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
        async with asking_batches() as (batches, _):
            record, ledger = await find_run_in_flight(self.kickoff_id, [batch.ledger for batch in batches])
            await answer_run(record, self.crew.crew, ledger, APPROVED, by="Ada")

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
    async with asking_batches() as (batches, _):
        return name in [batch.name for batch in batches]


async def test_a_row_is_answered_once_by_the_reviews_alone(tmp_path: Path) -> None:
    async with waiting_row(tmp_path) as row:
        for answer in (row.approve_in_a_flow, row.approve_in_python):
            with pytest.raises(CrewError, match="so nothing was sent"):
                await answer()
        assert row.server.resumes == []
        await row.approve()
        with pytest.raises(AnsweredError, match="has its answer on record"):
            await row.approve()
        assert len(row.server.resumes) == 1
        another = AskingServer()
        async with served(another.app()) as url:
            crew = DeployedCrew(url=url, token="secret-token")
            async with crew.client() as client:
                kickoff_id = await client.kickoff({})
            await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        assert len(another.resumes) == 1, "a batch of another crew is no obstacle"
