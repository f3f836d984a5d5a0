"""Waiting for a run under Prefect: its ends, its budgets, what is reported of it, and trouble on the way."""

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.blocks import crew_of
from prefect_crew.devserver import CrewServer, Outcome, Run
from prefect_crew.exceptions import StoreError
from prefect_crew.runs import polling as polling_module
from prefect_crew.runs import run as run_module
from prefect_crew.runs.database import find_store, in_store
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.testing import CrewServerFactory
from support.asking import judging
from support.flow_runs import acall_in_flow
from support.held import Held
from support.scripts import FAILS, script, slow
from support.seen import Seen
from support.transports import carried_by
from support.waiting import soon, until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

STOPPING = pc.WaitPolicy(initial=0.1, timeout=0.5, on_timeout="stop")


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that is done at once."""
    return crew_server(script({"output": "done"}))


async def attempt_of(run: pc.CrewRun) -> Attempt:
    (attempt,) = await in_store(attempts.of_kickoff_id, str(run.kickoff_id))
    return attempt


async def events_of(seen: Seen, run: pc.CrewRun) -> list[str]:
    return [event["event"] for event in await asyncio.to_thread(seen.events, run.kickoff_id)]


# Ends


@pytest.mark.parametrize("show", ["full", "none"])
async def test_a_failed_run_raises_the_crews_error(crew_server: CrewServerFactory, seen: Seen, show: Any):
    run = await crew_server(FAILS).crew(show=show).atrigger({})
    with pytest.raises(pc.CrewFailedError, match="failed: the search engine is down") as caught:
        await run.await_for_completion()
    assert caught.value.error == "the search engine is down"
    assert caught.value.kickoff_id == run.kickoff_id
    attempt = await attempt_of(run)
    assert attempt.state is AttemptState.FAILED
    assert attempt.error == (None if show == "none" else "the search engine is down")
    events = await asyncio.to_thread(seen.events, run.kickoff_id)
    assert ("search engine" in str(events)) is (show == "full")


async def test_a_run_without_an_end_is_reported(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["status:forgotten@3"])
    lost = await server.crew(wait=pc.WaitPolicy(lost_after=1)).atrigger({})
    with pytest.raises(pc.CrewLostError, match="last seen running"):
        await lost.await_for_completion()
    assert "crew.lost" in await events_of(seen, lost)
    late = await server.crew(wait=pc.WaitPolicy(timeout=0.2)).atrigger({})
    with pytest.raises(pc.CrewTimeoutError):
        await late.await_for_completion()
    assert "crew.timed_out" in await events_of(seen, late)


async def test_a_cancelled_wait_reports_its_end(server: CrewServer, seen: Seen, monkeypatch: pytest.MonkeyPatch):
    ending = asyncio.Event()

    async def slow_end(work: Any, *args: Any, **options: Any) -> Any:
        if work is attempts.ended:
            ending.set()
            await asyncio.sleep(0.3)
        return await in_store(work, *args, **options)

    monkeypatch.setattr(run_module, "in_store", slow_end)
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await ending.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert (await events_of(seen, run)).count("crew.completed") == 1


class HeldByText:
    """A crew that returns its input `text` once that is among `released`."""

    name = "held-by-text"

    def __init__(self) -> None:
        self.released = set[str]()

    def inputs(self) -> list[pc.CrewInput]:
        return [pc.CrewInput(name="text")]

    async def execute(self, run: Run) -> Outcome:
        while run.inputs["text"] not in self.released:
            await asyncio.sleep(0.005)
        return Outcome(str(run.inputs["text"]))


@pytest.mark.parametrize("is_row", [False, True], ids=["a run", "a row"])
async def test_the_end_of_an_id_that_the_run_has_left_is_not_its_end(
    crew_server: CrewServerFactory, key: str, tmp_path: Path, is_row: bool
):
    server = crew_server(program := HeldByText())
    crew, rows = server.crew(), [{"name": "one", "text": "left"}]
    if is_row:
        call: Any = pc.arun_batch(
            crew, rows, name="left", key="name", inputs={"text": "text"}, export=str(tmp_path / "x.jsonl")
        )
    else:
        call = pc.arun_crew(crew, {"text": "left"}, idempotency_key=key)
    waiting = asyncio.ensure_future(call)
    await until(lambda: server.requests["status"], "it is waited for")
    (attempt,) = await in_store(attempts.of_kickoff_id, server.runs[0].id)
    async with crew.client() as client:
        current = await client.kickoff({"text": "current"})
    await in_store(attempts.continued, attempt, current)  # as another process that has answered a question
    program.released.add("left")
    await until(lambda: server.runs[0].state.ended, "the id that it has left ends")
    polls = server.requests["status"]
    await until(lambda: waiting.done() or server.requests["status"] > polls + 3, "its current id is polled")
    program.released.add("current")
    end = await waiting
    assert end.ok if is_row else end.output == "current"
    ended = await in_store(attempts.get, attempt.id)
    assert ended is not None
    assert (ended.state, ended.first_id, ended.kickoff_id) == (AttemptState.COMPLETED, attempt.first_id, current)
    assert (await in_store(attempts.result_of, attempt.id))["output"] == "current"


@pytest.mark.parametrize("is_back", [True, False], ids=["for a moment", "until the end"])
async def test_a_crew_database_that_is_away_costs_no_result(
    server: CrewServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_back: bool
):
    run = await server.crew().atrigger({})
    left = [StoreError("The disk is full.", operation="any", started="yes")] * (1 if is_back else 100)

    async def away(work: Any, *args: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return await in_store(work, *args, **options)

    monkeypatch.setattr(run_module, "_kicked_off", {})  # as in another process
    for module in (run_module, polling_module):
        monkeypatch.setattr(module, "in_store", away)
    result = await pc.wait_for_crew(server.crew(), str(run.kickoff_id))
    assert result.output == "done"
    assert "could not be re" in caplog.text
    assert (await attempt_of(run)).state is (AttemptState.COMPLETED if is_back else AttemptState.STARTED)


async def test_a_later_task_knows_the_kickoffs_inputs(crew_server: CrewServerFactory, seen: Seen):
    requests: list[pc.ReviewRequest] = []

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {"pin": SecretStr("hunter22")}, meta={"ticket": 7})
        await pc.wait_for_crew(crew, kickoff_id, review=judging(requests))
        return kickoff_id

    tasks = ({"output": "a draft for {{ pin }}", "human": True}, {"output": "printed for {{ pin }}"})
    crew: Any = crew_of(crew_server(script(*tasks, inputs=["pin"])).crew()).called(f"crew-{uuid.uuid4().hex[:8]}")
    _, kickoff_id = await acall_in_flow(trip)
    assert [request.meta for request in requests] == [{"ticket": 7}]
    (artifact,) = await asyncio.to_thread(seen.artifacts, artifact_key(crew.label))
    assert kickoff_id in artifact["data"]
    assert "printed for" in artifact["data"]
    assert "hunter22" not in artifact["data"]


# Time, and runs of others


@pytest.fixture(params=[-7200.0, 7200.0], ids=["behind", "ahead"])
def other_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of the crew database differ from this process's by two hours."""
    monkeypatch.setattr(find_store(), "clock", lambda: time.time() + request.param)


async def test_the_time_of_a_run_is_that_of_the_crew_database(
    crew_server: CrewServerFactory, other_clock: None, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(held := Held())
    crew = server.crew(wait=pc.WaitPolicy(on_timeout="stop"))
    run = await crew.atrigger({})
    with pytest.raises(pc.CrewTimeoutError):
        await soon(run.await_for_completion(pc.WaitPolicy(timeout=0.2)))
    monkeypatch.setattr(run_module, "_kicked_off", {})  # as in another process
    waiting = asyncio.ensure_future(pc.wait_for_crew(crew, str(run.kickoff_id)))
    polls = server.requests["status"]
    await until(lambda: waiting.done() or server.requests["status"] > polls + 3, "it is waited for")
    held.release()
    assert (await waiting).output == "done"
    assert server.requests["stop"] == 0


async def test_a_task_timeout_ends_the_wait_at_once(crew_server: CrewServerFactory):
    server, wait_with_timeout = crew_server(slow(3600)), pc.wait_for_crew.with_options(timeout_seconds=0.5)

    async def trip() -> None:
        await wait_with_timeout(server.crew(), await pc.kickoff_crew(server.crew()), wait=pc.WaitPolicy(initial=3600))

    with pytest.raises(TimeoutError):
        await soon(acall_in_flow(trip))
    assert server.requests["stop"] == 0


async def test_a_run_of_nobody_is_stopped_once_late(crew_server: CrewServerFactory):
    server = crew_server(slow(60))
    async with server.crew().client() as client:
        run = pc.CrewRun(server.crew(), await client.kickoff({}))
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: server.requests["status"], "it is waited for")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert server.requests["stop"] == 0, "nobody cancelled a flow run"
    with pytest.raises(pc.CrewTimeoutError, match="It was stopped"):
        await run.await_for_completion(STOPPING)
    assert server.requests["stop"] == 1


async def test_a_late_crew_of_another_flow_run_runs_on(crew_server: Any, key: str, caplog: pytest.LogCaptureFixture):
    server = crew_server(slow(3))
    running = asyncio.ensure_future(acall_in_flow(lambda: pc.arun_crew(server.crew(), idempotency_key=key)))
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    late = await server.crew().atrigger({}, idempotency_key=key)
    with pytest.raises(pc.CrewTimeoutError, match="It was left running"):
        await late.await_for_completion(pc.WaitPolicy(initial=0.1, timeout=0.2, on_timeout="stop"))
    assert "started it and has not ended" in caplog.text
    assert server.requests["stop"] == 0
    assert (await running)[1].output == "done"


# What is logged


async def test_a_wait_for_a_person_is_reported_once(crew_server: Any, caplog: pytest.LogCaptureFixture):
    server = crew_server(script({"output": "a draft {{ feedback }}", "human": True}))
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: "waits for a person" in caplog.text, "a person is asked")
    polls = server.requests["status"]
    await until(lambda: server.requests["status"] > polls + 3, "the run is polled")
    assert caplog.text.count(f"Crew run {run.kickoff_id} waits for a person") == 1
    assert f"prefect-crew reviews approve {run.kickoff_id}" in caplog.text
    await run.aresume("shorter", approve=False)
    await until(lambda: caplog.text.count("waits for a person") >= 2, "a person is asked again")
    await run.aresume("fine", approve=True)
    await waiting
    attempt = await attempt_of(run)
    assert attempt.human_since is None
    assert attempt.human_seconds > 0
    asked = await in_store(questions.questions_of, attempt.id)
    assert [(question.answer["approve"], question.sent_at is not None) for question in asked] == [
        (False, True),
        (True, True),
    ]


async def test_the_log_has_each_task_and_trouble_once(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    # Each task goes on until it has been seen several times.
    tasks = Held("task_1", "task_2", "task_3", until=lambda number: server.requests["status"] >= 10 * number)
    server = crew_server(tasks, faults=["status:500@4-6"])
    run = await server.crew().atrigger({})
    await run.await_for_completion()
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith(f"Crew run {run.kickoff_id}")] == [
        f"Crew run {run.kickoff_id}: task_1 (0 of 3 tasks done)",
        f"Crew run {run.kickoff_id}: the status call answers again.",
        f"Crew run {run.kickoff_id}: task_2 (1 of 3 tasks done)",
        f"Crew run {run.kickoff_id}: task_3 (2 of 3 tasks done)",
        f"Crew run {run.kickoff_id} completed.",
    ]
    assert caplog.text.count("The run may be fine; it is polled again.") == 1


async def test_an_unknown_state_counts_as_running(caplog: pytest.LogCaptureFixture):
    """No server of ours has such a word, and ours counts tasks, so one answers here that does."""
    odd = {"state": "MARINATING", "progress": 0.5, "current_task": "plan"}
    answers = iter([odd, odd, odd, {"state": "SUCCESS", "result": "well done"}])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=next(answers)))
    with carried_by("odd.test", transport):
        run = pc.CrewRun(pc.DeployedCrew(url="https://odd.test", token="t"), "r1")
        await run.await_for_completion()
        assert (await run.afetch_result()).output == "well done"
    assert caplog.text.count("has the state 'MARINATING', which is not documented") == 1
    assert "Crew run r1: plan (50%)" in caplog.text
