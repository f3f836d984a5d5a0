"""Waiting for a run under Prefect: its ends, its budgets, what is reported of it, and trouble on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from prefect import flow
from pydantic import BaseModel, SecretStr

import prefect_crew as pc
from prefect_crew._internal import asyncio_tasks, prefect_api
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.records import results
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import polling
from prefect_crew.runs import wait as wait_module
from prefect_crew.runs.kickoff import open_run
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.wait import wait_for_run
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.held import Held
from support.proxy import Proxy
from support.records import key, record_of
from support.scripts import FAILS, script, slow
from support.seen import Seen
from support.transports import carried_by
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
BRIEF = pc.WaitPolicy(initial=0.1, timeout=0.5)
STOPPING = pc.WaitPolicy(initial=0.1, timeout=0.5, on_timeout="stop")


async def ended(run: pc.CrewRun) -> Any:
    await run.await_for_completion()
    return await run.afetch_result()


# Ends


async def test_a_completed_run_gives_its_result(crew_server: CrewServerFactory):
    server = crew_server("travel", speed=100, response_format="union")
    inputs = {"budget": "1000 USD", "interests": "food", "duration": "2 days", "age": "30"}
    run = await server.crew().atrigger(inputs)
    result = await ended(run)
    assert result.output.startswith("# Bologna, Italy: 2 days")
    assert result.data == {"destination": "Bologna", "country": "Italy", "days": "2", "season": "May or October"}
    assert [task.name for task in result.tasks] == ["research_destination", "plan_itinerary", "write_guide"]
    assert result.usage.total_tokens == 4183
    assert result.kickoff_id == run.kickoff_id
    record = await record_of(run.kickoff_id)
    assert (record.phase, record.state, record.error) == (RecordPhase.ENDED, CrewState.COMPLETED, None)
    assert record.kicked_off_at
    assert record.ended_at
    assert record.kicked_off_at <= record.ended_at


async def test_a_failed_run_raises_the_crews_error(crew_server: CrewServerFactory):
    run = await crew_server(FAILS).crew().atrigger({})
    with pytest.raises(pc.CrewFailedError, match="failed: the search engine is down") as caught:
        await run.await_for_completion()
    assert (caught.value.error, caught.value.kickoff_id) == ("the search engine is down", run.kickoff_id)
    record = await record_of(run.kickoff_id)
    assert (record.state, record.error) == (CrewState.FAILED, "the search engine is down")
    with pytest.raises(pc.CrewFailedError, match="the search engine is down"):
        await run.afetch_result()


async def test_a_crew_that_shows_nothing_hides_its_error(crew_server: CrewServerFactory, seen: Seen):
    run = await crew_server(FAILS).crew(show="none").atrigger({})
    with pytest.raises(pc.CrewFailedError):
        await run.await_for_completion()
    assert (await record_of(run.kickoff_id)).error == "not shown"
    events = await asyncio.to_thread(seen.events, run.kickoff_id)
    assert "search engine" not in str(events)


async def test_a_wait_by_a_template_finds_the_record(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    server, template = crew_server(script({"output": "done"})), key() + "-{scheduled_start:%Y}"
    run = await server.crew().atrigger({}, idempotency_key=template)
    monkeypatch.setattr("prefect_crew.runs.run._kicked_off", {})  # as in another process
    await pc.wait_for_crew.fn(server.crew(), run.kickoff_id, idempotency_key=template)
    assert (await record_of(run.kickoff_id)).state is CrewState.COMPLETED


async def test_a_failure_without_attempts_left_says_so(crew_server: CrewServerFactory):
    crew, idempotency_key = crew_server(FAILS).crew(max_attempts=1), key()
    for advice in ("This was attempt 1 of at most 1", "Nothing was started: crew"):
        run = await crew.atrigger({}, idempotency_key=idempotency_key)
        with pytest.raises(pc.CrewFailedError, match=advice):
            await run.await_for_completion()


async def test_a_forgotten_run_is_lost(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(slow(60), faults=["status:forgotten@3"]), key()
    run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    with pytest.raises(pc.CrewLostError, match="last seen running") as caught:
        await run.await_for_completion()
    assert (caught.value.kickoff_id, caught.value.idempotency_key) == (run.kickoff_id, idempotency_key)
    assert (await record_of(run.kickoff_id)).phase is RecordPhase.STARTED
    again = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    assert again.kickoff_id == run.kickoff_id
    assert server.kickoffs == 1


async def test_no_end_waits_for_the_version_of_the_crew(crew_server: CrewServerFactory):
    server = crew_server(slow(1), faults=["inspect:timeout"])
    running = asyncio.create_task(pc.arun_crew(server.crew(), {}))
    await until(lambda: server.requests["inspect"])
    began = time.monotonic()
    await running
    assert time.monotonic() - began < 4


async def test_a_templated_key_has_one_record(crew_server: CrewServerFactory):
    server = crew_server(script({"output": "done"}))
    options = RunOptions.of(idempotency_key=key() + "-{scheduled_start:%Y}")
    run = await open_run(RunRequest.of(crew_of(server.crew()), Inputs.of(None), options))
    first, looks = await wait_for_run(run, options), server.requests["status"]
    second = await wait_for_run(run, options)
    assert second.idempotency_key == first.idempotency_key == run.idempotency_key
    assert server.requests["status"] == looks, "the record has the result"


async def test_a_cancelled_wait_reports_the_end_it_writes(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    end, ending = PrefectRecords.end, asyncio.Event()

    async def slow_end(records: PrefectRecords, record: RunRecord, **how: Any) -> bool:
        is_closed = await end(records, record, **how)
        ending.set()
        await asyncio.sleep(0.3)
        return is_closed

    monkeypatch.setattr(PrefectRecords, "end", slow_end)
    run = await crew_server(script({"output": "done"})).crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await ending.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    events = await asyncio.to_thread(seen.events, run.kickoff_id)
    assert [event["event"] for event in events].count("crew.completed") == 1


async def test_a_cancelled_wait_leaves_a_stuck_write(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    async def slow_end(*_: Any, **__: Any) -> bool:
        ending.set()
        await asyncio.sleep(60)
        raise httpx.ConnectError("away")

    ending = asyncio.Event()
    monkeypatch.setattr(PrefectRecords, "end", slow_end)
    monkeypatch.setattr(asyncio_tasks, "UNCUT_FOR", 0.2)
    run = await crew_server(script({"output": "done"})).crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await ending.wait()
    waiting.cancel()
    done, _ = await asyncio.wait({waiting}, timeout=20)
    assert done


def away_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the Prefect API be away when this method of the records is called next."""
    method = getattr(PrefectRecords, name)

    async def away(*_: Any) -> None:
        monkeypatch.setattr(PrefectRecords, name, method)
        raise httpx.ConnectError("away")

    monkeypatch.setattr(PrefectRecords, name, away)


@pytest.mark.parametrize("way", ["trigger", "tasks"])
async def test_an_own_run_is_closed_after_a_failed_read(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, way: str
):
    @flow
    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {})
        away_once(monkeypatch, "attempts")
        await pc.wait_for_crew(crew, kickoff_id)
        return kickoff_id

    crew = crew_server(script({"output": "done"})).crew()
    if way == "tasks":
        kickoff_id = await trip()
    else:
        run = await crew.atrigger({})
        away_once(monkeypatch, "attempts")
        await run.await_for_completion()
        kickoff_id = run.kickoff_id
    assert (await record_of(kickoff_id)).phase is RecordPhase.ENDED


async def test_a_record_is_read_again_at_the_end(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    crew = crew_server(script({"output": "done"})).crew()
    run = await crew.atrigger({})
    away_once(monkeypatch, "of_kickoff")
    assert (await wait_for_run(LiveRun(crew_of(crew), run.kickoff_id))).idempotency_key == run.idempotency_key
    assert (await record_of(run.kickoff_id)).phase is RecordPhase.ENDED


async def test_a_later_task_knows_the_kickoffs_inputs(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, seen: Seen
):
    async def not_named(*_: Any) -> None:
        """Do what a Prefect API that goes away at this moment makes of it."""

    metas: list[Any] = []

    def review(question: pc.ReviewRequest) -> pc.Review:
        metas.append(question.meta)
        return pc.Review(approve=True)

    @flow
    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {"pin": SecretStr("hunter22")}, meta={"ticket": 7})
        await pc.wait_for_crew(crew, kickoff_id, review=review)
        return kickoff_id

    monkeypatch.setattr(PrefectRecords, "_name_kickoff", not_named)
    tasks = ({"output": "a draft for {{ pin }}", "human": True}, {"output": "printed for {{ pin }}"})
    crew = crew_of(crew_server(script(*tasks, inputs=["pin"])).crew()).called(f"crew-{uuid.uuid4().hex[:8]}")
    kickoff_id = await trip()
    assert metas == [{"ticket": 7}]
    (artifact,) = await asyncio.to_thread(seen.artifacts, artifact_key(crew.label))
    assert kickoff_id in artifact["data"]
    assert "printed for" in artifact["data"]
    assert "hunter22" not in artifact["data"]


# Time


async def test_a_timeout_leaves_the_crew_running(crew_server: CrewServerFactory):
    held = Held()
    server, idempotency_key = crew_server(held), key()
    run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    with pytest.raises(
        pc.CrewTimeoutError, match=r"was still running after its running time limit of 0\.5 s"
    ) as caught:
        await run.await_for_completion(BRIEF)
    error = caught.value
    assert (error.phase, error.limit, error.last_state, error.stopped) == ("running", 0.5, "running", False)
    assert f"run again with idempotency key {idempotency_key!r} and a larger timeout" in str(error)
    assert server.requests["stop"] == 0
    held.release()
    result = await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))
    assert (result.output, server.kickoffs) == ("done", 1)


async def test_an_ended_run_has_its_result_after_its_time(
    crew_server: CrewServerFactory,
):
    held = Held()
    server, idempotency_key = crew_server(held), key()
    run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    record = await record_of(run.kickoff_id)
    assert record.kicked_off_at
    record.kicked_off_at -= timedelta(hours=2)
    await RECORDS.save(record)
    with pytest.raises(pc.CrewTimeoutError, match=r"running time limit of 3,?600 s"):
        await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))
    held.release()
    await until(lambda: server.runs[0].state.ended, "the crew has ended")
    assert (await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))).output == "done"


async def test_a_task_timeout_ends_the_wait_at_once(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    server = crew_server("echo", faults=["kickoff:stuck"])
    wait_with_timeout = pc.wait_for_crew.with_options(timeout_seconds=0.5)

    @flow
    async def trip() -> None:
        kickoff_id = await pc.kickoff_crew(server.crew(), {"text": "a"})
        await wait_with_timeout(server.crew(), kickoff_id, wait=pc.WaitPolicy(initial=5))

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await trip()
    assert time.monotonic() - began < 5
    assert server.requests["stop"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, ""),
        ({"stop": False}, "its server has no /stop"),
        ({"faults": ["stop:500"]}, "could not be stopped"),
    ],
    ids=["stop", "no stop", "a server that fails"],
)
async def test_a_late_crew_can_be_stopped(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, options: dict[str, Any], says: str
):
    server = crew_server(slow(60), **options)
    run = await server.crew().atrigger({})
    with pytest.raises(pc.CrewTimeoutError) as caught:
        await run.await_for_completion(STOPPING)
    record = await record_of(run.kickoff_id)
    assert caught.value.stopped is (not options)
    assert ("It was stopped." if caught.value.stopped else "It was left running") in str(caught.value)
    assert says in caplog.text
    assert (record.state is CrewState.STOPPED) is caught.value.stopped
    assert ("unsupported" in (record.reason or "")) is ("stop" in options)


# People


async def test_each_wait_for_a_person_is_reported_once(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    # Of no length, so that all of the timeout is for a slow machine.
    asks = script({"name": "draft", "output": "a draft {{ feedback }}", "human": True}, {"name": "print"})
    server = crew_server(asks, response_format="union")
    crew = server.crew()
    run = await crew.atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion(pc.WaitPolicy(initial=0.1, timeout=2.0)))

    async def is_asked() -> bool:
        return (await record_of(run.kickoff_id)).human_since is not None

    await until(is_asked, "a person is asked")
    await asyncio.sleep(2.2)
    assert not waiting.done(), "a person's time does not count against the timeout"
    assert caplog.text.count(f"Crew run {run.kickoff_id} waits for a person") == 1
    assert f"prefect-crew reviews approve {run.kickoff_id}" in caplog.text
    await run.aresume("shorter", approve=False)
    await until(lambda: caplog.text.count("waits for a person") >= 2, "a person is asked again")
    await run.aresume("fine", approve=True)
    await waiting
    record = await record_of(run.kickoff_id)
    assert record.human_since is None
    assert record.human_seconds >= 2.2
    assert [(sent.task_id, sent.approve, sent.outcome) for sent in await RECORDS.reviews(record)] == [
        ("draft", False, "sent"),
        ("draft", True, "sent"),
    ]


# Results that the record does not hold


async def test_a_result_too_large_to_store_is_read_again(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "LARGEST", 8000)
    server, idempotency_key = crew_server(script({"output": "{{ 'שלום ' * 3000 }}"})), key()
    first = await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))
    assert len(first.output) == 15_000
    run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    assert (await record_of(run.kickoff_id)).result is None
    assert (await ended(run)).output == first.output
    server.faults.add("status:forgotten")
    with pytest.raises(pc.CrewLostError, match="it has completed, but the server has forgotten the result"):
        await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))


class Trip(BaseModel):
    city: str
    days: int


async def test_a_misfitting_result_is_kept(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(script({"output": '{"city": "Lisbon"}'})), key()
    with pytest.raises(
        pc.OutputTypeError, match=r"does not fit Trip: days: Field required.*The text: \{\"city\""
    ) as caught:
        await pc.arun_crew(server.crew(), idempotency_key=idempotency_key, output_type=Trip)
    assert caught.value.output == '{"city": "Lisbon"}'
    assert (await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)).output == '{"city": "Lisbon"}'
    assert server.kickoffs == 1


# Runs of others


async def foreign(crew_server: CrewServerFactory, text: str, **options: Any) -> tuple[Any, pc.CrewRun]:
    """Kick a crew off as somebody else would, who leaves no record."""
    server = crew_server(text, **options)
    async with server.crew().client() as client:
        return server, pc.CrewRun(server.crew(), await client.kickoff({}))


async def test_a_foreign_run_needs_no_record(crew_server: CrewServerFactory):
    _, run = await foreign(crew_server, slow(0.1))
    assert (await ended(run)).output == "done"
    assert await RECORDS.of_kickoff(run.kickoff_id) is None


def test_the_end_of_a_shared_run_is_reported_once(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server(slow(0.6)), key()

    @flow
    async def trip() -> Any:
        return await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)

    async def both() -> list[Any]:
        return [*await asyncio.gather(trip(), trip(), trip())]

    results = asyncio.run(both())
    assert {result.output for result in results} == {"done"}
    assert server.kickoffs == 1
    (kickoff_id,) = {result.kickoff_id for result in results}
    names = [event["event"] for event in seen.events(kickoff_id)]
    assert names.count("crew.completed") == 1


def test_a_timeout_and_a_loss_are_events(crew_server: CrewServerFactory, seen: Seen):
    slow_run = crew_server(slow(60)).crew().trigger({})
    with pytest.raises(pc.CrewTimeoutError):
        slow_run.wait_for_completion(BRIEF)
    lost = crew_server(slow(60), faults=["status:forgotten@2"]).crew().trigger({})
    with pytest.raises(pc.CrewLostError):
        lost.wait_for_completion()
    assert "crew.timed_out" in [event["event"] for event in seen.events(slow_run.kickoff_id)]
    assert "crew.lost" in [event["event"] for event in seen.events(lost.kickoff_id)]


# What is logged


async def test_the_log_has_each_task_once(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    # Each task goes on until it has been seen several times.
    seen_often = Held("task_1", "task_2", "task_3", until=lambda number: server.requests["status"] >= 5 * number)
    server = crew_server(seen_often)
    run = await server.crew().atrigger({})
    await run.await_for_completion()
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith(f"Crew run {run.kickoff_id}")]
    assert lines == [
        f"Crew run {run.kickoff_id}: task_1 (0 of 3 tasks done)",
        f"Crew run {run.kickoff_id}: task_2 (1 of 3 tasks done)",
        f"Crew run {run.kickoff_id}: task_3 (2 of 3 tasks done)",
        f"Crew run {run.kickoff_id} completed.",
    ]
    assert server.requests["status"] > 10


async def test_an_unknown_state_counts_as_running(
    caplog: pytest.LogCaptureFixture,
):
    """No server of ours has such a word, and ours counts tasks, so one answers here that does."""
    odd = {"state": "MARINATING", "progress": 0.5, "current_task": "plan"}
    answers = iter([odd, odd, odd, {"state": "SUCCESS", "result": "well done"}])

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=next(answers))

    with carried_by("odd.test", httpx.MockTransport(answer)):
        run = pc.CrewRun(pc.DeployedCrew(url="https://odd.test", token="t"), "r1")  # pyright: ignore[reportArgumentType]
        assert (await ended(run)).output == "well done"
    assert caplog.text.count("has the state 'MARINATING', which is not documented") == 1
    assert "Crew run r1: plan (50%)" in caplog.text


# Others


async def test_a_late_crew_of_another_flow_run_runs_on(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, idempotency_key = crew_server(slow(3)), key()

    @flow
    async def waiting() -> str:
        return (await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)).output

    running = asyncio.ensure_future(waiting())
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    late = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    with pytest.raises(pc.CrewTimeoutError, match="It was left running"):
        await late.await_for_completion(pc.WaitPolicy(initial=0.1, timeout=0.2, on_timeout="stop"))
    assert "started it and has not ended" in caplog.text
    assert server.requests["stop"] == 0
    assert await running == "done"


# Trouble with the status call


@pytest.mark.parametrize("fault", ["500", "429=0.05", "html", "drop", "redirect"])
async def test_trouble_with_the_status_ends_no_wait(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, fault: str
):
    server = crew_server(slow(0.2), faults=[f"status:{fault}@1-3", f"status:{fault}@5"])
    run = await server.crew().atrigger({})
    assert (await ended(run)).output == "done"
    assert server.kickoffs == 1
    assert caplog.text.count("The run may be fine") <= 2, "no log line a poll"
    assert "the status call answers again" in caplog.text


async def test_lasting_errors_end_the_wait(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo", faults=["status:500"]), key()
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    with pytest.raises(pc.CrewError, match="500") as caught:
        await run.await_for_completion(pc.WaitPolicy(initial=0.1, error_timeout=0.3))
    assert run.kickoff_id in str(caught.value)
    assert f"Call again with idempotency key {idempotency_key!r} to wait for it" in str(caught.value)
    server.faults.clear()
    assert (await ended(await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))).output == "a"
    assert server.kickoffs == 1


# The artifact


async def shown(seen: Seen, server: CrewServer, crew: pc.DeployedCrew) -> str:
    """Return the page of the only run of a server, "" where it has none."""
    pages = await asyncio.to_thread(seen.artifacts, artifact_key(crew_of(crew).label))
    ids = [run.id for run in server.runs]
    return next((page["data"] for page in pages if ids and ids[0] in page["description"]), "")


async def test_a_page_comes_before_the_first_look(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(polling, "fast_intervals", [])
    server = crew_server(slow(60))
    crew = server.crew(wait=pc.WaitPolicy(initial=60))
    running = asyncio.ensure_future(pc.arun_crew(crew, {}))
    page = await until(lambda: shown(seen, server, crew), "its page")
    assert "pending" in page, "no status was seen yet"
    assert server.requests["status"] == 0
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_late_page_does_not_hold_the_polls(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
):
    monkeypatch.setattr(wait_module, "SHOW_EVERY", 0.0)
    held = Held()
    server = crew_server(held)
    proxy.refuse, proxy.answer = "/api/artifacts", "503"
    running = asyncio.ensure_future(pc.arun_crew(server.crew(), {}))
    await until(lambda: server.requests["status"] > 3, "the run is polled while its page is refused")
    proxy.refuse = None
    held.release()
    assert (await running).output == "done"


async def test_a_page_after_the_end_is_written_once(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, seen: Seen
):
    free, take, asked = asyncio.Event(), prefect_api._Turns.turn, 0

    @contextlib.asynccontextmanager
    async def late(self: Any, urgency: prefect_api.Urgency, *, alone: bool = False) -> AsyncIterator[None]:
        nonlocal asked
        if urgency is prefect_api.Urgency.SHOW:
            asked += 1
            await free.wait()
        async with take(self, urgency, alone=alone):
            yield

    monkeypatch.setattr(prefect_api._Turns, "turn", late)
    server = crew_server("echo")
    crew = server.crew()
    running = asyncio.ensure_future(pc.arun_crew(crew, {"text": "a"}))
    await until(lambda: asked > 1, "its end is to be shown")
    assert proxy.count("/api/artifacts") == 0
    free.set()
    assert (await running).output == "a"
    assert proxy.count("/api/artifacts") == 1
    assert "completed" in await shown(seen, server, crew)


@pytest.mark.parametrize(
    ("show", "page_has"),
    [
        ("full", "Expected the status of this run"),
        ("summary", "gives no answer"),
        ("none", "gives no answer"),
    ],
)
async def test_an_odd_status_is_shown_where_all_is(
    crew_server: CrewServerFactory, seen: Seen, show: Any, page_has: str
):
    server = crew_server(slow(60), faults=["status:html"])
    crew = server.crew(show=show, wait=pc.WaitPolicy(initial=0.1, error_timeout=0.3))
    with pytest.raises(pc.CrewError) as caught:
        await pc.arun_crew(crew, {})
    page = await shown(seen, server, crew)
    assert (str(caught.value)[:60] in page) == (show == "full"), page
    assert page_has in page


# Tokens


async def test_a_rotated_token_is_taken_up(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    server, name = crew_server(slow(60)), f"rotated-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(server.crew().save, name)
    run = await (await pc.DeployedCrew.aload(name)).atrigger({})
    await asyncio.to_thread(lambda: server.crew(token="the-new-token").save(name, overwrite=True))
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    server.token = "the-new-token"
    await until(lambda: "has a new token" in caplog.text, "the token is renewed")
    looked = server.requests["status"]
    await until(lambda: server.requests["status"] >= looked + 3, "the wait goes on")
    assert server.unauthorized == 1
    assert not waiting.done()
    await run.astop()
    with pytest.raises(pc.CrewStoppedError):
        await waiting


async def test_a_refused_token_keeps_the_run(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(slow(0.3)), key()
    run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
    server.token = "the-new-token"
    with pytest.raises(pc.AuthenticationError) as caught:
        await run.await_for_completion()
    assert caught.value.kickoff_id == run.kickoff_id
    assert (await ended(await server.crew().atrigger({}, idempotency_key=idempotency_key))).output == "done"
    assert server.kickoffs == 1


# A Prefect API that is away


async def test_an_absent_prefect_api_ends_no_wait(crew_server: CrewServerFactory, proxy: Proxy):
    held = Held("task_1", "task_2", "task_3")
    server = crew_server(held)

    @flow
    async def trip() -> str:
        return (await pc.arun_crew(server.crew())).output

    running = asyncio.ensure_future(trip())
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    proxy.cut()
    held.release()
    await until(lambda: server.runs[0].state.ended, "the crew has ended")
    await asyncio.sleep(1.0)  # for what must not happen
    assert not running.done()
    proxy.restore()
    assert await asyncio.wait_for(running, 60) == "done"
    (record,) = [one async for one in RECORDS.all() if one.kickoff_id == server.runs[0].id]
    assert record.phase is RecordPhase.ENDED


async def test_an_unsaved_note_does_not_hold_the_polls(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server(script({"name": "draft", "output": "a draft", "human": True}), response_format="union")
    run = await server.crew().atrigger({})
    proxy.refuse, proxy.answer = "PATCH /api/variables", "503"
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: proxy.count("PATCH /api/variables") > 1, "the note is saved again and again")
    polls = server.requests["status"]
    await until(lambda: server.requests["status"] > polls + 2, "the run is polled meanwhile")
    proxy.refuse = None
    await run.aresume("fine", approve=True)
    await waiting


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("POST /api/variables/$", "could not be recorded"),
        ("POST /api/variables/filter", "could not be read"),
        ("/artifacts", "could not be updated"),
    ],
    ids=["saving", "finding", "showing"],
)
async def test_a_refusing_prefect_costs_no_result(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture, refused: str, says: str
):
    server = crew_server(slow(0.2))
    run = await server.crew().atrigger({})
    run = pc.CrewRun(server.crew(), str(run.kickoff_id))  # as in another process
    proxy.refuse = refused
    assert (await ended(run)).output == "done"
    assert says in caplog.text


# Runs without a record


async def test_a_late_crew_without_record_is_stopped(crew_server: CrewServerFactory):
    server, run = await foreign(crew_server, slow(60))
    with pytest.raises(pc.CrewTimeoutError, match="It was stopped"):
        await run.await_for_completion(STOPPING)
    assert server.requests["stop"] == 1


async def test_a_cancelled_wait_without_record_stops_nothing(crew_server: CrewServerFactory):
    server, run = await foreign(crew_server, slow(60))
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert server.requests["stop"] == 0
