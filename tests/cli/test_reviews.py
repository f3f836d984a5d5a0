"""`reviews`: what waits for a person, runs and rows of batches, and answers once a round, on a real Prefect server."""

import asyncio
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow

from prefect_crew import DeployedCrew, WaitPolicy, arun_crew, run_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import find_store
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from support.commands import TOKEN, Command
from support.crew_database import in_flight, request
from support.links import answers_of
from support.servers import Crews, nameless
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
WAIT = WaitPolicy(initial=0.1, factor=1, jitter=0, next_round_after=1, human_timeout=90)


@pytest.fixture
def block(store: Callable[..., str]) -> str:
    """The reviewed crew, stored. Its next round comes at once, so only time tells two questions apart."""
    return store("reviewed", wait={"next_round_after": 1, "human_timeout": 90})


def listed(here: Command, prefix: str) -> list[Any]:
    """Return the runs that `reviews ls` lists, whose keys begin so."""
    return [run for run in here("reviews", "ls", "-o", "json").json if run["idempotency_key"].startswith(prefix)]


def reviewed_run(block: str, key: str) -> str:
    @flow
    async def asking() -> str:
        return (await arun_crew(await DeployedCrew.aload(block), {"who": "Ada"}, idempotency_key=key)).output

    return asyncio.run(asking())


def reviewed_rows(block: str, name: str, folder: Path, rows: int, wait: WaitPolicy = WAIT) -> Any:
    data = [{"id": f"row {number}", "who": f"person {number}"} for number in range(rows)]
    return run_batch(block, data, name=name, key="id", export=str(folder / "out.jsonl"), wait=wait)


@pytest.mark.parametrize("rows", [pytest.param(0, id="a-run"), pytest.param(3, id="rows-of-a-batch")])
def test_what_waits_is_answered_once_a_round(
    here: Command, block: str, crews: CrewServer, tmp_path: Path, rows: int
) -> None:
    name = f"asked {uuid.uuid4().hex[:8]}"
    key = f"batch/{name}/row 0" if rows else name
    with ThreadPoolExecutor() as background:
        call = partial(reviewed_rows, block, name, tmp_path, rows) if rows else partial(reviewed_run, block, name)
        running = background.submit(call)
        stem = key.removesuffix("0")
        wait_until(lambda: len(listed(here, stem)) == max(1, rows), "all of them wait")
        first, *others = sorted(listed(here, stem), key=lambda run: run["idempotency_key"])
        assert first["crew"] == block
        assert first["task_id"] == "draft"
        assert first["round"] == 1
        assert first["answers"] == []
        assert f"{key}\t{block}\tdraft\t1\t" in here("reviews", "ls").out
        assert f"Answer: prefect-crew reviews approve {first['kickoff_id']}" in here("reviews", "inspect", key).out

        rejected = here("reviews", "reject", first["kickoff_id"], "--feedback", "warmer", "--by", "Grace")
        assert "task draft, question 1 rejected by Grace" in rejected.ok
        wait_until(lambda: [run["round"] for run in listed(here, key)] == [2], "the next question")
        assert "question 1 rejected by Grace" in here("reviews", "inspect", key).out
        for other in others:
            assert here("reviews", "approve", other["kickoff_id"]).code == 0
        approve = ("reviews", "approve", key)
        approved: Any = wait_until(
            lambda: (done := here(*approve)).code == 0 and done, "it counts as the next question"
        )
        assert "question 2 approved by" in approved.out
        outcome: Any = running.result(90)
    again = here("reviews", "approve", key)
    assert "does not wait for a person: it has ended (completed)" in again.error(1)
    if not rows:
        assert outcome == "sent to Ada"
        return
    assert outcome.completed == 3
    assert outcome.kickoffs == 3
    outputs = [json.loads(line)["output"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(outputs) == [f"sent to person {number}" for number in range(3)]
    given = asyncio.run(answers_of(key))
    assert [(one.round, one.approve, one.outcome) for one in given] == [(1, False, "sent"), (2, True, "sent")]


def write(crews: CrewServer, kickoff_id: str, *, task: str | None = "draft", **facts: Any) -> Attempt:
    """Write a run in flight that asks, as somebody else would have left it."""

    async def written() -> Attempt:
        store = find_store()
        of = {"crew": "not-stored", "crew_url": f"{crews.url}/reviewed"}
        attempt = await in_flight(store, request(f"asked {uuid.uuid4()}", **of | facts), kickoff_id)
        await store.run(questions.ask, attempt, 1, marks={}, task=task)
        return attempt

    return asyncio.run(written())


def asked(crews: CrewServer) -> str:
    """Kick the reviewed crew off without Prefect, and return its id once it waits."""
    url = f"{crews.url}/reviewed"
    with httpx.Client(headers=crews.headers) as client:
        kickoff_id = client.post(f"{url}/kickoff", json={"inputs": {"who": "Ada"}}).json()["kickoff_id"]
        wait_until(lambda: "human" in client.get(f"{url}/status/{kickoff_id}").text.lower(), "it asks")
    return kickoff_id


def test_a_crew_that_is_not_stored_is_listed_as_noted_and_asked_for(here: Command, crews: CrewServer) -> None:
    record = write(crews, asked(crews))
    (line,) = listed(here, record.key)
    assert line["task_id"] == "draft"
    assert line["output"] is None
    assert "was not asked" in line["withheld"]
    assert "Give --crew" in here("reviews", "approve", record.key).error(2)
    crew = ("--crew", f"{crews.url}/reviewed", "--by", "Ada")
    assert "approved by Ada" in here("reviews", "approve", record.key, *crew).out


def test_where_the_status_names_no_task_the_commands_ask_for_it(here: Command) -> None:
    script = "name: reviewed\ninputs: [who]\ntasks: [{name: draft, output: x, human: true}]"
    with Crews({"reviewed": script}, token=TOKEN) as server:
        nameless(server.crews["reviewed"])
        kickoff_id = asked(server)
        write(server, kickoff_id, task=None, crew=f"127.0.0.1:{server.port}/reviewed")
        crew = ("--crew", f"{server.url}/reviewed")
        command = f"prefect-crew reviews approve {kickoff_id} --crew {server.url}/reviewed --task TASK"
        assert f"Answer: {command}\n" in here("reviews", "inspect", kickoff_id, *crew).out
        assert here("reviews", "approve", kickoff_id, *crew).code == 2
        assert here("reviews", "approve", kickoff_id, *crew, "--task", "draft").code == 0


def test_what_cannot_be_answered_is_refused_and_nothing_is_sent(here: Command, block: str, crews: CrewServer) -> None:
    gone = write(crews, "ended")
    asyncio.run(find_store().run(attempts.ended, gone, "ended", AttemptState.FAILED))
    assert "has ended (failed)" in here("reviews", "inspect", gone.key).err
    record, resumes = write(crews, asked(crews), crew=block), crews.requests["resume"]
    for feedback in ((), ("--feedback", " ")):
        assert here("reviews", "reject", record.key, *feedback).code == 2

    async def died() -> None:
        store = find_store()
        (question,) = await store.run(questions.questions_of, record.id)
        await store.run(questions.answer, question.id, {"approve": True}, "Grace")
        await store.run(questions.send, question.id, "dead", 0.0)

    asyncio.run(died())
    refused = here("reviews", "approve", record.key).error(4)
    assert "nobody knows whether it arrived" in refused
    assert "by Grace" in refused
    assert crews.requests["resume"] == resumes
    assert "nobody knows whether the answer arrived" in here("reviews", "inspect", record.key).out
