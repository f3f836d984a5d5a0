"""People and Flows against a server that answers as hosted crews did in October 2026: `response_format="live"`."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest
from prefect import flow

import prefect_crew as pc
from prefect_crew import cli
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import in_store
from prefect_crew.store import attempts, questions
from prefect_crew.testing import CrewServerFactory
from support.scripts import script
from support.waiting import soon, until
from support.webhooks import SECRET, served

DRAFT = {"name": "draft", "agent": "Writer", "human": True, "output": "Draft. {{ feedback }}"}
ASKS = script(DRAFT)
WAIT = pc.WaitPolicy(initial=0.1, max_interval=0.2, lost_after=60.0, grace=60.0)
IMPATIENT = pc.WaitPolicy(initial=0.1, max_interval=0.2, lost_after=1.0, grace=1.0)
pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Serve a receiver, and have kickoffs ask for webhooks to it."""
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        yield


def run_of(server: CrewServer, key: str, wait: pc.WaitPolicy = WAIT, **options: Any) -> "asyncio.Task[pc.CrewResult]":
    crew = options.pop("crew", None) or server.crew(wait=wait)

    @flow(persist_result=False)
    async def asking() -> pc.CrewResult:
        return await pc.arun_crew(crew, {}, idempotency_key=key, **options)

    return asyncio.create_task(asking())  # type: ignore[arg-type]


def new_key() -> str:
    return f"live-{uuid.uuid4().hex[:12]}"


async def command(server: CrewServer, *words: str) -> int:
    with mock.patch.dict(os.environ, {"CREW_TOKEN": server.token}):
        return await asyncio.to_thread(cli.main, (*words, "--crew", server.url))


async def test_a_function_approves_after_a_second_question(crew_server: CrewServerFactory, receiver: None):
    server, asked = crew_server(ASKS, response_format="live"), list[pc.ReviewRequest]()

    async def judge(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request)
        return pc.Review(approve=len(asked) == 2, feedback="Shorter.")

    result = await soon(run_of(server, new_key(), review=judge))
    assert result.output == "Draft. Shorter."
    assert [request.output for request in asked] == ["Draft. ", "Draft. Shorter."]
    assert server.requests["resume"] == 2
    assert server.kickoffs == 1


async def test_the_run_that_an_answer_names_is_waited_for_after_a_crash(
    crew_server: CrewServerFactory, receiver: None, capsys: pytest.CaptureFixture[str]
):
    server, key = crew_server(ASKS, response_format="live"), new_key()

    async def judge(request: pc.ReviewRequest) -> pc.Review:
        return pc.Review(approve=bool(request.answers), feedback="Shorter.")

    first = run_of(server, key, review=judge)
    await until(lambda: server.requests["resume"] == 1, "the answer is sent")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    (run,) = server.runs
    assert await command(server, "runs", "inspect", key) == 0
    shown = capsys.readouterr().out
    assert run.id in shown
    assert min(run.former_ids) in shown
    result = await soon(run_of(server, key, review=judge))
    assert result.output == "Draft. Shorter."
    assert server.kickoffs == 1
    assert await command(server, "runs", "inspect", key) == 0
    assert f"Goes on as: {run.id}" in capsys.readouterr().out, "also after its end"


async def test_a_run_that_fails_after_an_answer_is_an_error_at_once(crew_server: CrewServerFactory, receiver: None):
    server = crew_server(script(DRAFT, {"fail": "'NoneType' object is not subscriptable"}), response_format="live")
    waiting = run_of(server, new_key(), review=lambda _: pc.Review(approve=True))
    with pytest.raises(pc.CrewFailedError, match="'NoneType' object is not subscriptable"):
        await soon(waiting)


async def test_without_its_webhook_a_question_is_lost_and_the_same_key_finds_it_later(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, key = crew_server(ASKS, response_format="live"), new_key()
    with pytest.raises(pc.CrewLostError, match="waits for a person looks the same"):
        await soon(run_of(server, key, IMPATIENT, review=lambda _: pc.Review(approve=True)))
    assert "by webhook only" in caplog.text
    (run,) = server.runs
    (question,) = run.questions.values()
    crew = server.crew(wait=WAIT)
    await pc.resume_crew(crew, run.id, feedback="", approve=True, task_id=question.uuid)
    result = await soon(run_of(server, key))
    assert result.output == "Draft. "
    assert server.kickoffs == 1


@pytest.mark.parametrize("known_by", ["webhook", "person"])
async def test_an_answer_whose_reply_is_lost_is_never_sent_again(
    crew_server: CrewServerFactory, receiver: None, known_by: str
):
    spec = script({**DRAFT, "seconds": 3 if known_by == "person" else 0})
    server, key = crew_server(spec, response_format="live", faults=["resume:drop-after-accept@1"]), new_key()
    with pytest.raises(pc.AnswerUncertainError, match="--kickoff-id"):
        await soon(run_of(server, key, review=lambda _: pc.Review(approve=False, feedback="No.")))
    (run,) = server.runs
    if known_by == "person":
        assert await command(server, "runs", "resolve", key, "--kickoff-id", run.id) == 0
    await until(lambda: run.questions, "the crew asks again")
    (attempt,) = await in_store(attempts.of_key, key)

    async def is_known() -> bool:
        return len(await in_store(questions.questions_of, attempt.id)) == 2

    await until(is_known, "the webhook of the second question")  # before it, the answer is uncertain
    result = await soon(run_of(server, key, review=lambda _: pc.Review(approve=True)))
    assert result.output == "Draft. No."
    assert server.requests["resume"] == 2
    assert server.kickoffs == 1


async def test_an_answer_that_may_not_have_arrived_makes_no_run_a_lost_one(
    crew_server: CrewServerFactory, receiver: None
):
    server, key = crew_server(ASKS, response_format="live", faults=["resume:drop-before-accept@1"]), new_key()
    for wait in (WAIT, IMPATIENT):
        with pytest.raises(pc.AnswerUncertainError, match="--kickoff-id"):
            await soon(run_of(server, key, wait, review=lambda _: pc.Review(approve=True)))
    assert await command(server, "runs", "resolve", key, "--lost", "--yes") == 2
    assert server.requests["resume"] == server.kickoffs == 1


async def test_an_uncertain_kickoff_whose_run_waits_for_a_person_is_resolved(
    crew_server: CrewServerFactory, receiver: None
):
    server = crew_server(ASKS, response_format="live", faults=["kickoff:drop-after-accept@1"])
    crew: Any = server.crew(wait=WAIT)
    key = new_key()
    await crew.save(key, _sync=False)  # where a receiver finds it
    with pytest.raises(pc.KickoffUncertainError):
        await run_of(server, key, crew=crew)

    async def is_resolved() -> bool:
        return (await in_store(attempts.of_key, key))[0].kickoff_id is not None

    await until(is_resolved, "the id of its run")
    result = await soon(run_of(server, key, crew=crew, review=lambda _: pc.Review(approve=True)))
    assert result.output == "Draft. "
    assert server.kickoffs == 1


async def test_a_stop_names_the_run_that_goes_on(crew_server: CrewServerFactory, receiver: None):
    server, key = crew_server(script(DRAFT, {"seconds": 60}), response_format="live"), new_key()
    waiting = run_of(server, key, review=lambda _: pc.Review(approve=True))
    await until(lambda: server.requests["resume"] == 1, "the answer is sent")
    assert await command(server, "runs", "cancel", key) == 0
    with pytest.raises(pc.CrewStoppedError):
        await soon(waiting)


async def test_command_answers_a_question_that_no_status_shows(crew_server: CrewServerFactory, receiver: None):
    server, key = crew_server(ASKS, response_format="live"), new_key()
    waiting = run_of(server, key)
    await until(lambda: server.runs and server.runs[0].questions, "the crew asks")

    async def approved() -> bool:
        return await command(server, "reviews", "approve", key) == 0

    await until(approved, "the question is known")
    assert (await soon(waiting)).output == "Draft. "
    assert server.requests["resume"] == 1


async def test_a_status_whose_meta_names_an_uncertain_key_resolves_it(crew_server: CrewServerFactory):
    spec = script({"name": "write", "output": "Done."})
    server, key = crew_server(spec, response_format="live", faults=["kickoff:drop-after-accept@1"]), new_key()
    with pytest.raises(pc.KickoffUncertainError):
        await run_of(server, key)
    (run,) = server.runs
    crew = server.crew(wait=WAIT)

    @flow
    async def wait_for_it() -> str:
        await asyncio.sleep(WAIT.initial)
        return (await pc.wait_for_crew(crew, run.id)).output

    assert await wait_for_it() == "Done."
    assert (await run_of(server, key)).output == "Done."
    assert server.kickoffs == 1


async def test_a_flow_is_started_with_fewer_inputs_than_its_state_has(crew_server: CrewServerFactory):
    spec = script({"output": "Done."}, inputs=["count", "history"], flow=True)
    server = crew_server(spec, response_format="live")
    result = await pc.arun_crew(server.crew(flow=True, wait=WAIT), {"history": ["a"]})
    assert result.output == "Done."
    assert server.runs[0].inputs == {"history": ["a"]}
