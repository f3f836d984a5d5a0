"""`reviews` for rows of batches, whose records and answers live in their ledgers."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import BatchReport, DeployedCrew, WaitPolicy, run_batch
from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.reviews.answer import ASKS
from support.commands import TOKEN
from support.deployed import wait_until
from support.prefect_server import PrefectServer

pytestmark = pytest.mark.usefixtures("prefect_api")

WAIT = WaitPolicy(initial=0.1, factor=1, jitter=0, next_round_after=1)


@pytest.fixture
def block(prefect_api: PrefectServer, crews: CrewServer) -> Iterator[str]:
    """The reviewed crew, stored."""
    name = f"reviewed-{uuid.uuid4().hex[:8]}"
    # Its status does not show the output, and its next round comes at once: only time tells the two apart.
    wait = WaitPolicy(next_round_after=1)
    DeployedCrew(url=f"{crews.url}/reviewed", token=TOKEN, wait=wait).save(name)
    yield name
    DeployedCrew.delete(name)


class Running:
    """A batch, in a thread."""

    def __init__(self, block: str, folder: Path, rows: int, **options: Any) -> None:
        self.name = f"asked {uuid.uuid4().hex[:8]}"
        self.output = folder / f"{self.name}.jsonl"
        self.outcome: Any = None
        data = [{"id": f"row {number}", "who": f"person {number}"} for number in range(rows)]

        def run() -> None:
            try:
                self.outcome = run_batch(
                    block, data, name=self.name, key="id", output=str(self.output), **{"wait": WAIT, **options}
                )
            except BaseException as error:
                self.outcome = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def idempotency_key(self, row: int) -> str:
        return f"batch/{self.name}/row {row}"

    def report(self) -> BatchReport:
        self._thread.join(90)
        assert not self._thread.is_alive()
        assert isinstance(self.outcome, BatchReport), self.outcome
        return self.outcome


def test_rows_that_wait_are_listed_answered_once_a_round_and_go_on(
    here: Any, block: str, crews: CrewServer, tmp_path: Path
) -> None:
    running = Running(block, tmp_path, 3)

    def listed() -> list[Any]:
        return [
            one
            for one in here("reviews", "ls", "-o", "json").json
            if one["idempotency_key"].startswith(f"batch/{running.name}/")
        ]

    lines = wait_until(lambda: len(found := listed()) == 3 and found, seconds=60, what="three rows that wait")
    assert {line["idempotency_key"] for line in lines} == {running.idempotency_key(row) for row in range(3)}
    assert {(line["crew"], line["task_id"], line["round"], line["seen"]) for line in lines} == {
        (block, "draft", 1, True)
    }
    inspected = here("batch", "inspect", running.name)
    assert "3 in flight wait for a person" in inspected.out

    first = lines[0]
    rejected = here("reviews", "reject", running.idempotency_key(0), "--feedback", "warmer", "--by", "Grace")
    assert rejected.code == 0, rejected.err
    assert "task draft, round 1 rejected by Grace" in rejected.out
    wait_until(
        lambda: (
            next((one for one in listed() if one["idempotency_key"] == running.idempotency_key(0)), first)["round"] == 2
        ),
        seconds=60,
        what="the next question",
    )
    resumes = crews.requests["resume"]
    late = here("reviews", "approve", running.idempotency_key(0), "--round", "1")
    assert (late.code, crews.requests["resume"]) == (1, resumes)
    assert "round 1 rejected by Grace" in here("reviews", "inspect", running.idempotency_key(0)).out
    for line in lines[1:]:
        done = here("reviews", "approve", line["kickoff_id"][:13])
        assert done.code == 0, done.err
    wait_until(
        lambda: here("reviews", "approve", running.idempotency_key(0), "--round", "2").code == 0,
        seconds=60,
        what="the answer, once the question counts as the next one",
    )
    report = running.report()
    assert (report.completed, report.kickoffs) == (3, 3)
    outputs = {line["key"]: line["output"] for line in map(json.loads, running.output.read_text().splitlines())}
    assert outputs == {f"row {number}": f"sent to person {number}" for number in range(3)}
    assert asyncio.run(answers(running.name, "row 0")) == [(1, False, "Grace", "sent"), (2, True, "sent")]
    ended = here("reviews", "approve", running.idempotency_key(1))
    assert ended.code == 1, "and its ledger is not opened any more"
    assert running.name not in dict(asyncio.run(list_batches(ASKS)))


async def answers(name: str, row: str) -> list[tuple[Any, ...]]:
    async with open_stored_batch(name) as batch:
        (record,) = await batch.ledger.attempts(batch.ledger.idempotency_key(row))
        given = await batch.ledger.reviews(record)
    return [(one.round, one.approve, *([one.by] if one.by == "Grace" else []), one.outcome) for one in given]


def test_a_ledger_that_is_elsewhere_is_named(here: Any, block: str, tmp_path: Path) -> None:
    running = Running(block, tmp_path, 1, wait=WaitPolicy(initial=0.1, factor=1, jitter=0, human_timeout=2))
    report = running.report()
    assert report.errors == {"CrewTimeoutError": 1}
    (listed,) = [
        one for one in here("reviews", "ls", "-o", "json").json if one["idempotency_key"] == running.idempotency_key(0)
    ]
    ledger = Path(f"{running.output}.ledger.db")
    ledger.rename(tmp_path / "elsewhere.db")
    listing = here("reviews", "ls")
    assert listed["kickoff_id"] not in listing.out
    assert f"Rows of batch '{running.name}' wait for people" in listing.err
    assert str(ledger) in " ".join(listing.err.split())
    assert not ledger.exists()


def test_a_row_that_asks_too_often_or_is_not_answered_ends_as_its_policy_says(
    here: Any, block: str, crews: CrewServer, tmp_path: Path
) -> None:
    late = {"human_timeout": 1.5, "initial": 0.1, "factor": 1.0, "jitter": 0.0}
    stopped = Running(block, tmp_path, 1, wait=WaitPolicy(**late, on_human_timeout="stop"))  # type: ignore[arg-type]
    assert json.loads((stopped.report(), stopped.output.read_text())[1])["state"] == "stopped"
    resumes = crews.requests["resume"]
    policy = WaitPolicy(**{**late, "human_timeout": 4}, on_human_timeout="reject", max_rounds=1)  # type: ignore[arg-type]
    rejected = Running(block, tmp_path, 1, wait=policy).report()
    assert crews.requests["resume"] == resumes + 1
    assert rejected.failed == 1
    assert set(rejected.errors) <= {"ReviewLimitError", "CrewTimeoutError"}
