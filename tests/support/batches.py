"""What tests of batches make: records of rows, ledgers in PostgreSQL, ledgers as time passes for them."""

import asyncio
import json
import sqlite3
import uuid
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from prefect_crew import BatchReport, DeployedCrew, WaitPolicy, arun_batch
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.batches.database import attempts
from prefect_crew.batches.dataset import Dataset, open_dataset
from prefect_crew.batches.ledger import PAGE, Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.rows import RowJob, RowPlan
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import Crew
from prefect_crew.records.model import RunRecord
from support.postgres import Postgres
from support.records import new_record

CREW, FLOW = (
    crew_of(DeployedCrew(url="https://crew.example", token="token", flow=flow))  # type: ignore[arg-type]
    for flow in (False, True)
)


def topics(count: int, bad: Collection[int] = (), **more: Any) -> list[dict[str, Any]]:
    """Return so many rows; the crew `PICKY` fails with those of `bad`."""
    return [{"topic": f"{'bad' if number in bad else 'topic'} {number}", **more} for number in range(count)]


class Batches:
    """Runs batches whose outputs and ledgers are in a test's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def __call__(self, crew: DeployedCrew, rows: Any, *, name: str | None = None, **options: Any) -> BatchReport:
        """Run a batch; a name of its own unless one is given."""
        options.setdefault("export", str(self.output))
        options.setdefault("wait", WaitPolicy(initial=0.02, factor=1.0, jitter=0))
        return await arun_batch(crew, rows, name=name or f"batch {uuid.uuid4().hex[:8]}", **options)

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    def lines(self, path: Path | None = None) -> dict[str, dict[str, Any]]:
        """Return the lines by their keys, after a check that no key is there twice."""
        lines = [json.loads(line) for line in (path or self.output).read_text().splitlines()]
        keys = [line["key"] for line in lines]
        assert len(set(keys)) == len(keys), "a row is there twice"
        return dict(zip(keys, lines, strict=True))

    async def pages(self, name: str) -> list[str]:
        """Return the artifacts of a batch, one for each flow run that ran it."""
        key = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(name, prefix="batch")]))
        async with get_client() as client:
            return [str(one.data) for one in await client.read_artifacts(artifact_filter=key)]


def row_plan(data: Any, *, expected: Sequence[CrewInput] = (), crew: Crew | None = None, **options: Any) -> RowPlan:
    """Return how rows become runs; `options` are those of a batch. With a session, the crew is a Flow."""
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    return RowPlan(dataset, BatchOptions(**options), crew or (FLOW if "session" in options else CREW), expected)


def record_of(ledger: Ledger, key: str, *, attempt: int = 1, **facts: Any) -> RunRecord:
    """Return the claim of a row; `facts` are more fields of the record."""
    known = {"attempt": attempt, "owner": uuid.uuid4().hex, "crew": "c", "crew_url": "https://crew.example"}
    return new_record(ledger.idempotency_key(key), **known | facts)


async def enter(ledger: Ledger, *keys: str) -> None:
    """Write rows of a data set into a ledger, in this order."""
    jobs = [RowJob(number, key, Inputs.of({"topic": key})) for number, key in enumerate(keys)]
    for start in range(0, len(jobs), PAGE):
        await ledger.enter_rows(jobs[start : start + PAGE], CREW)


def let_an_hour_pass(path: str) -> None:
    """Let no kickoff of a ledger in SQLite be on its way any more: the ledger's own clock says until when it may be."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE crew_attempts SET posts_until = posts_until - 3600")


def postgres_ledger(postgres: Postgres) -> str:
    return postgres.create_database(f"ledger_{uuid.uuid4().hex[:12]}").replace("postgresql+asyncpg", "postgresql")


async def attempts_read_in_scans(address: str) -> int:
    """Return how many attempts of a ledger in PostgreSQL were read by going through the whole table."""
    engine = create_async_engine(address.replace("postgresql:", "postgresql+asyncpg:"))
    try:
        for _ in range(100):  # a session tells what it has read when it ends
            async with engine.connect() as connection:
                others = await connection.scalar(
                    text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
                )
                read = await connection.scalar(
                    text("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = :name"), {"name": attempts.name}
                )
            if others == 1:
                return int(read)
            await asyncio.sleep(0.05)
        raise AssertionError("the ledger is still open")
    finally:
        await engine.dispose()
