"""Waiting for a run under Prefect: its ends, its budgets, what is reported of it, and trouble on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
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
from support.asking import judging
from support.flow_runs import acall_in_flow
from support.held import Held
from support.proxy import Proxy
from support.records import record_of
from support.scripts import FAILS, script, slow
from support.seen import Seen
from support.transports import carried_by
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
BRIEF = pc.WaitPolicy(initial=0.1, timeout=0.5)
STOPPING = pc.WaitPolicy(initial=0.1, timeout=0.5, on_timeout="stop")


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that is done at once."""
    return crew_server(script({"output": "done"}))


@pytest.fixture
def slow_server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that takes a minute."""
    return crew_server(slow(60))


async def ended(run: pc.CrewRun) -> Any:
    await run.await_for_completion()
    return await run.afetch_result()


async def again(server: CrewServer, key: str) -> Any:
    """Return the result of a further call with a key."""
    return await ended(await server.crew().atrigger({}, idempotency_key=key))


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


@pytest.mark.parametrize("show", ["full", "none"])
async def test_a_failed_run_raises_the_crews_error(crew_server: CrewServerFactory, seen: Seen, show: Any):
    run = await crew_server(FAILS).crew(show=show).atrigger({})
    with pytest.raises(pc.CrewFailedError, match="failed: the search engine is down") as caught:
        await run.await_for_completion()
    assert caught.value.error == "the search engine is down"
    assert caught.value.kickoff_id == run.kickoff_id
    record = await record_of(run.kickoff_id)
    assert record.state is CrewState.FAILED
    assert record.error == ("not shown" if show == "none" else "the search engine is down")
    with pytest.raises(pc.CrewFailedError, match=f"failed: {record.error}"):
        await run.afetch_result()
    events = await asyncio.to_thread(seen.events, run.kickoff_id)
    assert ("search engine" in str(events)) is (show == "full")


async def test_a_templated_key_has_one_record(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    options = RunOptions.of(idempotency_key=key + "-{scheduled_start:%Y}")
    run = await open_run(RunRequest.of(crew_of(server.crew()), Inputs.of(None), options))
    monkeypatch.setattr("prefect_crew.runs.run._kicked_off", {})  # as in another process
    await pc.wait_for_crew.fn(server.crew(), run.kickoff_id, idempotency_key=options.idempotency_key)
    assert (await record_of(run.kickoff_id)).state is CrewState.COMPLETED
    first, looks = await wait_for_run(run, options), server.requests["status"]
    second = await wait_for_run(run, options)
    assert second.idempotency_key == first.idempotency_key == run.idempotency_key
    assert server.requests["status"] == looks, "the record has the result"


async def test_a_failure_without_attempts_left_says_so(crew_server: CrewServerFactory, key: str):
    crew = crew_server(FAILS).crew(max_attempts=1)
    for advice in ("This was attempt 1 of at most 1", "Nothing was started: crew"):
        run = await crew.atrigger({}, idempotency_key=key)
        with pytest.raises(pc.CrewFailedError, match=advice):
            await run.await_for_completion()


async def events_of(seen: Seen, run: pc.CrewRun) -> list[str]:
    return [event["event"] for event in await asyncio.to_thread(seen.events, run.kickoff_id)]


async def test_a_forgotten_run_is_lost(slow_server: CrewServer, seen: Seen, key: str):
    slow_server.faults.add("status:forgotten@3")
    run = await slow_server.crew().atrigger({}, idempotency_key=key)
    with pytest.raises(pc.CrewLostError, match="last seen running") as caught:
        await run.await_for_completion()
    assert (caught.value.kickoff_id, caught.value.idempotency_key) == (run.kickoff_id, key)
    assert (await record_of(run.kickoff_id)).phase is RecordPhase.STARTED
    assert (await slow_server.crew().atrigger({}, idempotency_key=key)).kickoff_id == run.kickoff_id
    assert slow_server.kickoffs == 1
    assert "crew.lost" in await events_of(seen, run)


async def test_no_end_waits_for_the_version_of_the_crew(crew_server: CrewServerFactory):
    server = crew_server(slow(1), faults=["inspect:timeout"])
    running = asyncio.create_task(pc.arun_crew(server.crew(), {}))
    await until(lambda: server.requests["inspect"])
    began = time.monotonic()
    await running
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("is_stuck", [False, True])
async def test_a_cancelled_wait_reports_its_end(server: CrewServer, seen: Seen, monkeypatch: Any, is_stuck: bool):
    end, ending = PrefectRecords.end, asyncio.Event()

    async def slow_end(records: PrefectRecords, record: RunRecord, **how: Any) -> bool:
        is_closed = is_stuck or await end(records, record, **how)
        ending.set()
        await asyncio.sleep(60 if is_stuck else 0.3)
        return is_closed

    monkeypatch.setattr(PrefectRecords, "end", slow_end)
    if is_stuck:
        monkeypatch.setattr(asyncio_tasks, "UNCUT_FOR", 0.2)
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await ending.wait()
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=20)
    assert waiting.cancelled()
    assert (await events_of(seen, run)).count("crew.completed") == (not is_stuck)


@pytest.mark.parametrize(
    ("way", "read"), [("trigger", "attempts"), ("tasks", "attempts"), ("another process", "of_kickoff")]
)
async def test_a_run_is_closed_after_a_failed_read(server: CrewServer, key: str, monkeypatch: Any, way: str, read: str):
    def be_away_once() -> None:
        method = getattr(PrefectRecords, read)

        async def away(*_: Any) -> None:
            monkeypatch.setattr(PrefectRecords, read, method)
            raise httpx.ConnectError("away")

        monkeypatch.setattr(PrefectRecords, read, away)

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {}, idempotency_key=key)
        be_away_once()
        return (await pc.wait_for_crew(crew, kickoff_id)).kickoff_id

    crew = server.crew()
    if way == "tasks":
        _, kickoff_id = await acall_in_flow(trip)
    else:
        run = await crew.atrigger({}, idempotency_key=key)
        be_away_once()
        kickoff_id = run.kickoff_id
        if way == "trigger":
            await run.await_for_completion()
        else:
            assert (await wait_for_run(LiveRun(crew_of(crew), kickoff_id))).idempotency_key == key
    assert (await record_of(kickoff_id)).phase is RecordPhase.ENDED


async def test_a_later_task_knows_the_kickoffs_inputs(crew_server: Any, monkeypatch: pytest.MonkeyPatch, seen: Seen):
    asked: list[pc.ReviewRequest] = []

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {"pin": SecretStr("hunter22")}, meta={"ticket": 7})
        await pc.wait_for_crew(crew, kickoff_id, review=judging(asked))
        return kickoff_id

    monkeypatch.setattr(PrefectRecords, "_name_kickoff", AsyncMock(return_value=None))  # as if it went away just now
    tasks = ({"output": "a draft for {{ pin }}", "human": True}, {"output": "printed for {{ pin }}"})
    crew = crew_of(crew_server(script(*tasks, inputs=["pin"])).crew()).called(f"crew-{uuid.uuid4().hex[:8]}")
    _, kickoff_id = await acall_in_flow(trip)
    assert [one.meta for one in asked] == [{"ticket": 7}]
    (artifact,) = await asyncio.to_thread(seen.artifacts, artifact_key(crew.label))
    assert kickoff_id in artifact["data"]
    assert "printed for" in artifact["data"]
    assert "hunter22" not in artifact["data"]


# Time


async def test_a_timeout_leaves_the_crew_running(crew_server: CrewServerFactory, seen: Seen, key: str):
    server = crew_server(held := Held())
    run = await server.crew().atrigger({}, idempotency_key=key)
    with pytest.raises(
        pc.CrewTimeoutError, match=r"was still running after its running time limit of 0\.5 s"
    ) as caught:
        await run.await_for_completion(BRIEF)
    error = caught.value
    assert (error.phase, error.limit, error.last_state, error.stopped) == ("running", 0.5, "running", False)
    assert f"run again with idempotency key {key!r} and a larger timeout" in str(error)
    assert server.requests["stop"] == 0
    assert "crew.timed_out" in await events_of(seen, run)
    held.release()
    assert (await again(server, key)).output == "done"
    assert server.kickoffs == 1


async def test_an_ended_run_has_its_result_after_its_time(crew_server: CrewServerFactory, key: str):
    server = crew_server(held := Held())
    run = await server.crew().atrigger({}, idempotency_key=key)
    record = await record_of(run.kickoff_id)
    assert record.kicked_off_at
    record.kicked_off_at -= timedelta(hours=2)
    await RECORDS.save(record)
    with pytest.raises(pc.CrewTimeoutError, match=r"running time limit of 3,?600 s"):
        await again(server, key)
    held.release()
    await until(lambda: server.runs[0].state.ended, "the crew has ended")
    assert (await again(server, key)).output == "done"


async def test_a_task_timeout_ends_the_wait_at_once(slow_server: CrewServer):
    wait_with_timeout = pc.wait_for_crew.with_options(timeout_seconds=0.5)

    async def trip() -> None:
        kickoff_id = await pc.kickoff_crew(slow_server.crew())
        await wait_with_timeout(slow_server.crew(), kickoff_id, wait=pc.WaitPolicy(initial=5))

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await acall_in_flow(trip)
    assert time.monotonic() - began < 5
    assert slow_server.requests["stop"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, ""),
        ({"stop": False}, "its server has no /stop"),
        ({"faults": ["stop:500"]}, "could not be stopped"),
    ],
    ids=["stop", "no stop", "a server that fails"],
)
async def test_a_late_crew_can_be_stopped(crew_server: Any, caplog: Any, options: dict[str, Any], says: str):
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


async def test_a_wait_for_a_person_is_reported_once(crew_server: Any, caplog: pytest.LogCaptureFixture):
    # Of no length, so that all of the timeout is for a slow machine.
    asks = script({"name": "draft", "output": "a draft {{ feedback }}", "human": True}, {"name": "print"})
    server = crew_server(asks, response_format="union")
    run = await server.crew().atrigger({})
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


async def test_a_result_too_large_to_store_is_read_again(crew_server: Any, key: str, monkeypatch: Any):
    monkeypatch.setattr(results, "LARGEST", 8000)
    server = crew_server(script({"output": "{{ 'שלום ' * 3000 }}"}))
    first = await again(server, key)
    assert len(first.output) == 15_000
    assert (await record_of(first.kickoff_id)).result is None
    assert (await again(server, key)).output == first.output
    server.faults.add("status:forgotten")
    with pytest.raises(pc.CrewLostError, match="it has completed, but the server has forgotten the result"):
        await again(server, key)


class Trip(BaseModel):
    city: str
    days: int


async def test_a_misfitting_result_is_kept(crew_server: CrewServerFactory, key: str):
    server, text = crew_server(script({"output": '{"city": "Lisbon"}'})), '{"city": "Lisbon"}'
    says = r"does not fit Trip: days: Field required.*The text: \{\"city\""
    with pytest.raises(pc.OutputTypeError, match=says) as caught:
        await pc.arun_crew(server.crew(), idempotency_key=key, output_type=Trip)
    assert caught.value.output == text
    assert (await pc.arun_crew(server.crew(), idempotency_key=key)).output == text
    assert server.kickoffs == 1


# Runs of others


async def foreign(server: CrewServer) -> pc.CrewRun:
    """Kick a crew off as somebody else would, who leaves no record."""
    async with server.crew().client() as client:
        return pc.CrewRun(server.crew(), await client.kickoff({}))


async def test_a_foreign_run_needs_no_record(server: CrewServer):
    run = await foreign(server)
    assert (await ended(run)).output == "done"
    assert await RECORDS.of_kickoff(run.kickoff_id) is None


async def test_a_late_crew_without_record_is_stopped(slow_server: CrewServer):
    with pytest.raises(pc.CrewTimeoutError, match="It was stopped"):
        await (await foreign(slow_server)).await_for_completion(STOPPING)
    assert slow_server.requests["stop"] == 1


async def test_a_cancelled_wait_without_record_stops_nothing(slow_server: CrewServer):
    waiting = asyncio.ensure_future((await foreign(slow_server)).await_for_completion())
    await until(lambda: slow_server.requests["status"], "it is waited for")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert slow_server.requests["stop"] == 0


# What is logged


async def test_the_log_has_each_task_once(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    # Each task goes on until it has been seen several times.
    tasks = Held("task_1", "task_2", "task_3", until=lambda number: server.requests["status"] >= 5 * number)
    server = crew_server(tasks)
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


async def test_an_unknown_state_counts_as_running(caplog: pytest.LogCaptureFixture):
    """No server of ours has such a word, and ours counts tasks, so one answers here that does."""
    odd = {"state": "MARINATING", "progress": 0.5, "current_task": "plan"}
    answers = iter([odd, odd, odd, {"state": "SUCCESS", "result": "well done"}])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=next(answers)))
    with carried_by("odd.test", transport):
        run = pc.CrewRun(pc.DeployedCrew(url="https://odd.test", token="t"), "r1")
        assert (await ended(run)).output == "well done"
    assert caplog.text.count("has the state 'MARINATING', which is not documented") == 1
    assert "Crew run r1: plan (50%)" in caplog.text


# Others


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


# Trouble with the status call


@pytest.mark.parametrize("fault", ["500", "429=0.05", "html", "drop", "redirect"])
async def test_trouble_with_the_status_ends_no_wait(crew_server: Any, caplog: pytest.LogCaptureFixture, fault: str):
    server = crew_server(slow(0.2), faults=[f"status:{fault}@1-3", f"status:{fault}@5"])
    run = await server.crew().atrigger({})
    assert (await ended(run)).output == "done"
    assert server.kickoffs == 1
    assert caplog.text.count("The run may be fine") <= 2, "no log line a poll"
    assert "the status call answers again" in caplog.text


@pytest.mark.parametrize(
    ("fault", "error"), [("status:500", pc.ServerError), ("status:401", pc.AuthenticationError)], ids=["500", "401"]
)
async def test_lasting_errors_end_the_wait(server: CrewServer, key: str, fault: str, error: type[pc.CrewAPIError]):
    server.faults.add(fault)
    run = await server.crew().atrigger({}, idempotency_key=key)
    with pytest.raises(error, match=fault[-3:]) as caught:
        await run.await_for_completion(pc.WaitPolicy(initial=0.1, error_timeout=0.3))
    assert caught.value.kickoff_id == run.kickoff_id
    if error is pc.ServerError:
        assert run.kickoff_id in str(caught.value)
        assert f"Call again with idempotency key {key!r} to wait for it" in str(caught.value)
    server.faults.clear()
    assert (await again(server, key)).output == "done"
    assert server.kickoffs == 1


# The artifact


async def shown(seen: Seen, server: CrewServer, crew: pc.DeployedCrew) -> str:
    """Return the page of the only run of a server, "" where it has none."""
    pages = await asyncio.to_thread(seen.artifacts, artifact_key(crew_of(crew).label))
    ids = [run.id for run in server.runs]
    return next((page["data"] for page in pages if ids and ids[0] in page["description"]), "")


async def test_a_page_comes_before_the_first_look(slow_server: CrewServer, seen: Seen, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(polling, "fast_intervals", [])
    crew = slow_server.crew(wait=pc.WaitPolicy(initial=60))
    running = asyncio.ensure_future(pc.arun_crew(crew, {}))
    page = await until(lambda: shown(seen, slow_server, crew), "its page")
    assert "pending" in page, "no status was seen yet"
    assert slow_server.requests["status"] == 0
    running.cancel()
    await asyncio.wait({running})


async def test_a_late_page_does_not_hold_the_polls(crew_server: Any, monkeypatch: pytest.MonkeyPatch, proxy: Proxy):
    monkeypatch.setattr(wait_module, "SHOW_EVERY", 0.0)
    server = crew_server(held := Held())
    proxy.refuse, proxy.answer = "/api/artifacts", "503"
    running = asyncio.ensure_future(pc.arun_crew(server.crew(), {}))
    await until(lambda: server.requests["status"] > 3, "the run is polled while its page is refused")
    proxy.refuse = None
    held.release()
    assert (await running).output == "done"


async def test_a_page_after_the_end_is_written_once(server: CrewServer, monkeypatch: Any, proxy: Proxy, seen: Seen):
    free, take, asked = asyncio.Event(), prefect_api._Turns.turn, list[Any]()

    @contextlib.asynccontextmanager
    async def late(self: Any, urgency: prefect_api.Urgency, **options: Any) -> AsyncIterator[None]:
        if urgency is prefect_api.Urgency.SHOW:
            asked.append(urgency)
            await free.wait()
        async with take(self, urgency, **options):
            yield

    monkeypatch.setattr(prefect_api._Turns, "turn", late)
    crew = server.crew()
    running = asyncio.ensure_future(pc.arun_crew(crew, {}))
    await until(lambda: len(asked) > 1, "its end is to be shown")
    assert proxy.count("/api/artifacts") == 0
    free.set()
    assert (await running).output == "done"
    assert proxy.count("/api/artifacts") == 1
    assert "completed" in await shown(seen, server, crew)


@pytest.mark.parametrize("show", ["full", "summary", "none"])
async def test_an_odd_status_is_shown_where_all_is(slow_server: CrewServer, seen: Seen, show: Any):
    slow_server.faults.add("status:html")
    crew = slow_server.crew(show=show, wait=pc.WaitPolicy(initial=0.1, error_timeout=0.3))
    with pytest.raises(pc.CrewError) as caught:
        await pc.arun_crew(crew, {})
    page = await shown(seen, slow_server, crew)
    assert (str(caught.value)[:60] in page) is (show == "full"), page
    assert ("Expected the status of this run" if show == "full" else "gives no answer") in page


# A Prefect API that is away


async def test_an_absent_prefect_api_ends_no_wait(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server(held := Held("task_1", "task_2", "task_3"))

    running = asyncio.ensure_future(acall_in_flow(lambda: pc.arun_crew(server.crew())))
    await until(lambda: server.requests["status"] > 0, "it is waited for")
    proxy.cut()
    held.release()
    await until(lambda: server.runs[0].state.ended, "the crew has ended")
    await asyncio.sleep(1.0)  # for what must not happen
    assert not running.done()
    proxy.restore()
    assert (await asyncio.wait_for(running, 60))[1].output == "done"
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
async def test_a_refusing_prefect_costs_no_result(crew_server: Any, proxy: Proxy, caplog: Any, refused: str, says: str):
    server = crew_server(slow(0.2))
    run = await server.crew().atrigger({})
    run = pc.CrewRun(server.crew(), str(run.kickoff_id))  # as in another process
    proxy.refuse = refused
    assert (await ended(run)).output == "done"
    assert says in caplog.text
