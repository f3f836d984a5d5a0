"""What tests of batches make."""

import json
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from prefect_crew import BatchReport, DeployedCrew, WaitPolicy, arun_batch
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.batches.dataset import Dataset, open_dataset
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.output import Output
from prefect_crew.batches.rows import RowPlan
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.crew import Crew
from prefect_crew.runs.database import find_store
from prefect_crew.store.batches import Row
from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import AttemptState
from prefect_crew.store.schema import attempts

CREW, FLOW = (
    crew_of(DeployedCrew(url="https://crew.example", token="token", flow=flow))  # type: ignore[arg-type]
    for flow in (False, True)
)


def topics(count: int, bad: Collection[int] = (), **more: Any) -> list[dict[str, Any]]:
    """Return so many rows; the crew `PICKY` fails with those of `bad`."""
    return [{"topic": f"{'bad' if number in bad else 'topic'} {number}", **more} for number in range(count)]


async def let_an_hour_pass() -> None:
    """Let no kickoff be on its way any more: the crew database says until when it may be."""
    await find_store().run(_let_an_hour_pass)


@transaction("write")
def _let_an_hour_pass(transaction: Transaction) -> None:
    transaction.lock()
    transaction.connection.execute(sa.update(attempts).values(deadline=attempts.c.deadline - 3600))


class Batches:
    """Runs batches whose outputs are in a test's folder."""

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


def row(key: str, state: str | None = "completed", *, output: str = "text", data: Any = None, **facts: Any) -> Row:
    """Return a row of a batch as the crew database gives it."""
    has_run = state not in (None, "posting", "uncertain")
    facts = {"error": "the engine is down"} | facts if state == "failed" else facts
    if state == "completed" and "result" not in facts:
        tasks, usage = [TaskResult(name="t", output="x").model_dump(exclude_none=True)], {"total_tokens": 7}
        facts["result"] = {"output": output, "data": data, "tasks": tasks, "execution_time": 1.5, "usage": usage}
    known: dict[str, Any] = dict.fromkeys(Row.__slots__) | {"position": 0, "passes": 1, "is_conflict": False}
    known |= {"row_key": key, "inputs": {"topic": key}, "state": state and AttemptState(state)}
    if has_run:
        known |= {"kickoff_id": f"run-{key}", "started_at": 100.0, "ended_at": 102.0}
    return Row(**known | facts)


async def pages(*rows: Row, size: int = 100) -> AsyncIterator[list[Row]]:
    """Yield rows, so many at a time."""
    for start in range(0, len(rows), size):
        yield [*rows[start : start + size]]


def nothing() -> None:
    """Guard nothing."""


async def write(output: Output, *rows: Row, size: int = 100) -> int:
    """Write rows of a batch to its output, and return the number of lines."""
    return (await output.write(pages(*rows, size=size), nothing)).total()
