"""`reviews`: what waits for a person, and answers once a round, on a real Prefect server."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.runtime import flow_run

from prefect_crew import DeployedCrew, WaitPolicy, arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase, RunRecord, SentReview, utcnow
from prefect_crew.records.store import PrefectRecords
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


class Asking:
    """A flow run, in a thread, whose crew waits for a person."""

    def __init__(self, block: str, **options: Any) -> None:
        self.idempotency_key = f"asking {uuid.uuid4()}"
        self.outcome: Any = None

        @flow
        async def asking() -> str:
            crew = await DeployedCrew.aload(block)
            return (await arun_crew(crew, {"who": "Ada"}, idempotency_key=self.idempotency_key, **options)).output

        def run() -> None:
            try:
                self.outcome = asyncio.run(asking())
            except BaseException as error:
                self.outcome = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def record(self) -> RunRecord:
        return asyncio.run(PrefectRecords().attempts(self.idempotency_key))[-1]

    def until_asked(self) -> RunRecord:
        """Wait until a person is asked, and return what is on record then."""

        def asked() -> bool:
            attempts = asyncio.run(PrefectRecords().attempts(self.idempotency_key))
            return bool(attempts) and attempts[-1].human_since is not None

        wait_until(asked, seconds=60, what="a person is waited for")
        return self.record

    def result(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.outcome


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

    rejected = here("reviews", "reject", str(record.kickoff_id)[:12], "--feedback", "warmer", "--by", "Grace")
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
    assert asking.result() == "sent to Ada"
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


def test_a_round_that_was_not_looked_at_is_not_answered(here: Any, block: str, crews: CrewServer) -> None:
    record = write(crews, crew=block, kickoff_id=asked(crews))
    resumes = crews.requests["resume"]
    refused = here("reviews", "approve", record.idempotency_key, "--round", "2")
    assert refused.code == 1
    assert "is at round 1, not 2" in refused.err
    assert crews.requests["resume"] == resumes


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
        record = write(live, crew=f"127.0.0.1:{live.port}/reviewed", kickoff_id=kickoff_id, human_task=noted)

        @flow
        def waiting() -> str:
            asyncio.run(PrefectRecords().add_waiter(record, str(flow_run.id)))
            return here("runs", "inspect", kickoff_id, *crew).out

        crew = ("--crew", f"{live.url}/reviewed")
        command = f"prefect-crew reviews approve {kickoff_id} --crew {live.url}/reviewed --task {noted or 'TASK'}"
        assert f"Answer: {command}, or reject" in waiting()
        assert f"Answer: {command}\n" in here("reviews", "inspect", kickoff_id, *crew).out
        assert here("reviews", "approve", kickoff_id, *crew).code == 1
        done = here("reviews", "approve", kickoff_id, *crew, "--task", "draft")
        assert done.code == 0, done.err


def test_what_names_no_run_or_several_is_refused(here: Any, crews: CrewServer) -> None:
    first = write(crews, kickoff_id=f"twin-{uuid.uuid4()}")
    write(crews, kickoff_id=f"twin-{uuid.uuid4()}")
    assert "2 runs in flight begin with 'twin-'" in here("reviews", "approve", "twin-").err
    assert here("reviews", "approve", "nobody has this").code == 1
    gone = write(crews, phase=RecordPhase.ENDED, state="failed", ended_at=utcnow(), kickoff_id="ended")
    assert "has ended (failed)" in here("reviews", "inspect", gone.idempotency_key).err
    assert here("reviews", "reject", str(first.kickoff_id)).code == 2
    assert here("reviews", "reject", str(first.kickoff_id), "--feedback", " ").code == 2
