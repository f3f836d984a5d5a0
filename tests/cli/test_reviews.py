"""`reviews`: what waits for a person, runs and rows of batches, and answers once a round, on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow

from prefect_crew import DeployedCrew, WaitPolicy, arun_crew, run_batch
from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase, RunRecord, SentReview, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import ASKS
from support.commands import TOKEN
from support.deployed import wait_until
from support.prefect_server import PrefectServer
from support.records import put

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture
def block(prefect_api: PrefectServer, crews: CrewServer) -> Iterator[str]:
    """The reviewed crew, stored; its status shows what is to be judged."""
    name = f"reviewed-{uuid.uuid4().hex[:8]}"
    # Its status does not show the output, and its next round comes at once: only time tells the two apart.
    wait = WaitPolicy(next_round_after=1)
    DeployedCrew(url=f"{crews.url}/reviewed", token=TOKEN, wait=wait).save(name)
    yield name
    DeployedCrew.delete(name)


class Background:
    """A call in a thread, and what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._outcome: Any = None

        def run() -> None:
            try:
                self._outcome = call()
            except BaseException as error:
                self._outcome = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def outcome(self) -> Any:
        self._thread.join(90)
        assert not self._thread.is_alive()
        return self._outcome


class Asking(Background):
    """A flow run whose crew waits for a person."""

    def __init__(self, block: str) -> None:
        self.idempotency_key = f"asking {uuid.uuid4()}"

        @flow
        async def asking() -> str:
            crew = await DeployedCrew.aload(block)
            return (await arun_crew(crew, {"who": "Ada"}, idempotency_key=self.idempotency_key)).output

        super().__init__(lambda: asyncio.run(asking()))

    def until_asked(self) -> RunRecord:
        """Wait until a person is asked, and return what is on record then."""

        def asked() -> RunRecord | None:
            attempts = asyncio.run(PrefectRecords().attempts(self.idempotency_key))
            return attempts[-1] if attempts and attempts[-1].human_since is not None else None

        return wait_until(asked, seconds=60, what="a person is waited for")


def test_what_waits_is_listed_answered_and_goes_on(here: Any, block: str) -> None:
    asking = Asking(block)
    record = asking.until_asked()

    (line,) = [
        one for one in here("reviews", "ls", "-o", "json").json if one["idempotency_key"] == asking.idempotency_key
    ]
    assert (line["crew"], line["task_id"], line["round"], line["answers"]) == (block, "draft", 1, [])
    assert line["flow_run_id"] == record.flow_run_id
    assert line["since"]
    assert f"{asking.idempotency_key}\t{block}\tdraft\t1\t" in here("reviews", "ls").out
    shown = here("reviews", "inspect", asking.idempotency_key).out
    assert f"Answer: prefect-crew reviews approve {record.kickoff_id}" in shown

    rejected = here("reviews", "reject", str(record.kickoff_id), "--feedback", "warmer", "--by", "Grace")
    assert rejected.code == 0, rejected.err
    assert "task draft, round 1 rejected by Grace" in rejected.out

    def second() -> bool:
        lines = [
            one for one in here("reviews", "ls", "-o", "json").json if one["idempotency_key"] == asking.idempotency_key
        ]
        return bool(lines) and lines[0]["round"] == 2

    wait_until(second, seconds=60, what="the next question")
    shown = here("reviews", "inspect", asking.idempotency_key)
    assert "round 1 rejected by Grace" in shown.out
    approved = wait_until(
        lambda: (
            (done := here("reviews", "approve", asking.idempotency_key, "--round", "2", "-o", "json")).code == 0
            and done
        ),
        seconds=60,
        what="the answer, once the question counts as the next one",
    )
    assert (approved.json["round"], approved.json["approve"], approved.json["outcome"]) == (2, True, "sent")
    assert asking.outcome() == "sent to Ada"
    assert [(one.round, one.approve, one.outcome) for one in asyncio.run(PrefectRecords().reviews(record))] == [
        (1, False, "sent"),
        (2, True, "sent"),
    ]
    again = here("reviews", "approve", asking.idempotency_key)
    assert again.code == 1
    assert "does not wait for a person: it has ended (completed)" in again.err


def write(crews: CrewServer, **facts: Any) -> RunRecord:
    """Write a record as somebody else would have left it."""
    record = RunRecord(
        **{
            "idempotency_key": f"key {uuid.uuid4()}",
            "attempt": 1,
            "crew": "not-stored",
            "crew_url": f"{crews.url}/reviewed",
            "inputs_digest": "d" * 32,
            "owner": uuid.uuid4().hex,
            "claimed_at": utcnow(),
            "phase": RecordPhase.STARTED,
            "kickoff_id": f"k-{uuid.uuid4()}",
            "human_since": utcnow(),
            "human_task": "draft",
            **facts,
        }
    )
    return asyncio.run(put(record))


def asked(crews: CrewServer) -> str:
    """Kick the reviewed crew off without Prefect, and return its id once it waits."""
    kicked = httpx.post(f"{crews.url}/reviewed/kickoff", headers=crews.headers, json={"inputs": {"who": "Ada"}})
    kickoff_id = kicked.json()["kickoff_id"]

    def waits() -> bool:
        status = httpx.get(f"{crews.url}/reviewed/status/{kickoff_id}", headers=crews.headers).json()
        return "human" in str(status.get("status") or status.get("state")).lower()

    wait_until(waits, seconds=30, what="a person is waited for")
    return kickoff_id


def test_an_answer_whose_fate_is_unknown_is_not_given_again(here: Any, block: str, crews: CrewServer) -> None:
    record = write(crews, crew=block, kickoff_id=asked(crews))
    sent = SentReview(task_id="draft", round=1, approve=True, by="Grace", at=utcnow(), outcome="uncertain")
    assert asyncio.run(PrefectRecords().add_review(record, 1, sent))
    resumes = crews.requests["resume"]
    refused = here("reviews", "approve", str(record.kickoff_id))
    assert refused.code == 1
    assert "nobody knows whether it arrived" in refused.err
    assert "by Grace" in refused.err
    assert crews.requests["resume"] == resumes
    assert "it is not known whether that arrived" in here("reviews", "inspect", record.idempotency_key).out


def test_a_crew_that_is_not_stored_is_listed_as_noted_and_asked_for(here: Any, crews: CrewServer) -> None:
    record = write(crews, kickoff_id=asked(crews))
    (line,) = [
        one for one in here("reviews", "ls", "-o", "json").json if one["idempotency_key"] == record.idempotency_key
    ]
    assert (line["seen"], line["task_id"], line["output"]) == (False, "draft", None)
    refused = here("reviews", "approve", record.idempotency_key)
    assert refused.code == 1
    assert "Give --crew" in refused.err
    done = here("reviews", "approve", record.idempotency_key, "--crew", f"{crews.url}/reviewed", "--by", "Ada")
    assert done.code == 0, done.err
    assert "approved by Ada" in done.out


@pytest.mark.parametrize("noted", [None, "draft"])
def test_where_the_status_names_no_task_the_commands_ask_for_it(here: Any, noted: str | None) -> None:
    script = "name: reviewed\ninputs: [who]\ntasks: [{name: draft, output: x, human: true}]"
    with CrewServer({"reviewed": script}, token=TOKEN, response_format="live") as live:
        kickoff_id = asked(live)
        write(live, crew=f"127.0.0.1:{live.port}/reviewed", kickoff_id=kickoff_id, human_task=noted)
        crew = ("--crew", f"{live.url}/reviewed")
        command = f"prefect-crew reviews approve {kickoff_id} --crew {live.url}/reviewed --task {noted or 'TASK'}"
        assert f"Answer: {command}\n" in here("reviews", "inspect", kickoff_id, *crew).out
        assert here("reviews", "approve", kickoff_id, *crew).code == 1
        done = here("reviews", "approve", kickoff_id, *crew, "--task", "draft")
        assert done.code == 0, done.err


def test_what_names_no_run_in_flight_is_refused(here: Any, crews: CrewServer) -> None:
    first = write(crews)
    assert "No run in flight is 'nobody has this'" in here("reviews", "approve", "nobody has this").err
    gone = write(crews, phase=RecordPhase.ENDED, state="failed", ended_at=utcnow(), kickoff_id="ended")
    assert "has ended (failed)" in here("reviews", "inspect", gone.idempotency_key).err
    assert here("reviews", "reject", str(first.kickoff_id)).code == 2
    assert here("reviews", "reject", str(first.kickoff_id), "--feedback", " ").code == 2


# Rows of batches, whose records and answers live in their ledgers

WAIT = WaitPolicy(initial=0.1, factor=1, jitter=0, next_round_after=1)


class Running(Background):
    """A batch."""

    def __init__(self, block: str, folder: Path, rows: int, **options: Any) -> None:
        self.name = f"asked {uuid.uuid4().hex[:8]}"
        self.output = folder / f"{self.name}.jsonl"
        data = [{"id": f"row {number}", "who": f"person {number}"} for number in range(rows)]
        given = {"name": self.name, "key": "id", "output": str(self.output), "wait": WAIT, **options}
        super().__init__(lambda: run_batch(block, data, **given))

    def idempotency_key(self, row: int) -> str:
        return f"batch/{self.name}/row {row}"


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
        done = here("reviews", "approve", line["kickoff_id"])
        assert done.code == 0, done.err
    wait_until(
        lambda: here("reviews", "approve", running.idempotency_key(0), "--round", "2").code == 0,
        seconds=60,
        what="the answer, once the question counts as the next one",
    )
    report = running.outcome()
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
    report = running.outcome()
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
