"""Waiting for a run under Prefect: its ends, its budgets, what is reported of it, and trouble on the way."""

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
from pydantic import SecretStr, create_model

import prefect_crew as pc
from prefect_crew._internal import prefect_api
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords
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
from support.records import phases, record_of
from support.scripts import FAILS, script, slow
from support.seen import Seen
from support.transports import carried_by
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
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
    server = crew_server("travel", speed=100, response_format="live")
    inputs = {"budget": "1000 USD", "interests": "food", "duration": "2 days", "age": "30"}
    run = await server.crew().atrigger(inputs)
    result = await ended(run)
    assert result.output.startswith("# Bologna, Italy: 2 days")
    assert result.data == {"destination": "Bologna", "country": "Italy", "days": "2", "season": "May or October"}
    assert result.usage.total_tokens == 4183
    assert result.kickoff_id == run.kickoff_id
    record = await record_of(run.kickoff_id)
    assert record.phase == RecordPhase.ENDED
    assert record.state == CrewState.COMPLETED
    assert record.error is None
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


async def events_of(seen: Seen, run: pc.CrewRun) -> list[str]:
    return [event["event"] for event in await asyncio.to_thread(seen.events, run.kickoff_id)]


async def test_a_forgotten_run_is_reported_as_lost(slow_server: CrewServer, seen: Seen):
    slow_server.faults.add("status:forgotten@3")
    run = await slow_server.crew(wait=pc.WaitPolicy(lost_after=1)).atrigger({})
    with pytest.raises(pc.CrewLostError, match="last seen running"):
        await run.await_for_completion()
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

    async def slow_end(records: PrefectRecords, record: RunRecord, **facts: Any) -> bool:
        ending.set()
        await asyncio.sleep(60 if is_stuck else 0.3)
        return await end(records, record, **facts)

    monkeypatch.setattr(PrefectRecords, "end", slow_end)
    if is_stuck:
        monkeypatch.setattr("prefect_crew._internal.asyncio_tasks.UNCUT_FOR", 0.2)
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())
    await ending.wait()
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=20)
    assert waiting.cancelled()
    assert (await events_of(seen, run)).count("crew.completed") == (not is_stuck)


async def test_a_run_is_closed_after_a_failed_read(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    run = await server.crew().atrigger({}, idempotency_key=key)
    reads = [httpx.ConnectError("away"), await record_of(run.kickoff_id)]
    monkeypatch.setattr(PrefectRecords, "of_kickoff", AsyncMock(side_effect=reads))
    result = await wait_for_run(LiveRun(crew_of(server.crew()), run.kickoff_id))  # as in another process
    assert result.idempotency_key == key
    assert await phases(key) == [RecordPhase.ENDED]


async def test_a_later_task_knows_the_kickoffs_inputs(crew_server: Any, monkeypatch: pytest.MonkeyPatch, seen: Seen):
    requests: list[pc.ReviewRequest] = []

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {"pin": SecretStr("hunter22")}, meta={"ticket": 7})
        await pc.wait_for_crew(crew, kickoff_id, review=judging(requests))
        return kickoff_id

    monkeypatch.setattr(PrefectRecords, "_name_kickoff", AsyncMock(return_value=None))  # as if it went away just now
    tasks = ({"output": "a draft for {{ pin }}", "human": True}, {"output": "printed for {{ pin }}"})
    crew: Any = crew_of(crew_server(script(*tasks, inputs=["pin"])).crew()).called(f"crew-{uuid.uuid4().hex[:8]}")
    _, kickoff_id = await acall_in_flow(trip)
    assert [request.meta for request in requests] == [{"ticket": 7}]
    (artifact,) = await asyncio.to_thread(seen.artifacts, artifact_key(crew.label))
    assert kickoff_id in artifact["data"]
    assert "printed for" in artifact["data"]
    assert "hunter22" not in artifact["data"]


# Time


async def test_a_timeout_leaves_the_crew_running(crew_server: CrewServerFactory, seen: Seen, key: str):
    server = crew_server(held := Held())
    run = await server.crew().atrigger({}, idempotency_key=key)
    record = await record_of(run.kickoff_id)
    assert record.kicked_off_at
    record.kicked_off_at -= timedelta(hours=2)
    await RECORDS.save(record)
    with pytest.raises(pc.CrewTimeoutError, match=r"running time limit of 3,?600 s") as caught:
        await again(server, key)
    assert not caught.value.stopped
    assert f"run again with idempotency key {key!r} and a larger timeout" in str(caught.value)
    assert "crew.timed_out" in await events_of(seen, run)
    held.release()
    await until(lambda: server.runs[0].state.ended, "the crew has ended")
    assert (await again(server, key)).output == "done", "it has its result after its time"
    assert server.kickoffs == 1
    assert server.requests["stop"] == 0


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
    ("options", "message", "reason"),
    [
        ({}, "was asked to stop", None),
        ({"stop": False}, "its server has no /stop", "stop was asked for: unsupported"),
        ({"faults": ["stop:500"]}, "could not be stopped", "stop was asked for"),
    ],
    ids=["stop", "no stop", "a server that fails"],
)
async def test_a_late_crew_can_be_stopped(
    crew_server: Any, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str, reason: str | None
):
    run = await crew_server(slow(60), **options).crew().atrigger({})
    with pytest.raises(pc.CrewTimeoutError, match="It was left running" if options else "It was stopped") as caught:
        await run.await_for_completion(STOPPING)
    record = await record_of(run.kickoff_id)
    assert caught.value.stopped is (not options)
    assert record.state is (None if options else CrewState.STOPPED)
    assert message in caplog.text
    assert reason is None or record.reason == reason


# People


async def test_a_wait_for_a_person_is_reported_once(crew_server: Any, caplog: pytest.LogCaptureFixture):
    server = crew_server(script({"output": "a draft {{ feedback }}", "human": True}))
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion())

    async def is_asked() -> bool:
        return (await record_of(run.kickoff_id)).human_since is not None

    await until(is_asked, "a person is asked")
    polls = server.requests["status"]
    await until(lambda: server.requests["status"] > polls + 3, "the run is polled")
    assert caplog.text.count(f"Crew run {run.kickoff_id} waits for a person") == 1
    assert f"prefect-crew reviews approve {run.kickoff_id}" in caplog.text
    await run.aresume("shorter", approve=False)
    await until(lambda: caplog.text.count("waits for a person") >= 2, "a person is asked again")
    await run.aresume("fine", approve=True)
    await waiting
    record = await record_of(run.kickoff_id)
    assert record.human_since is None
    assert record.human_seconds > 0
    assert [(review.approve, review.outcome) for review in await RECORDS.reviews(record)] == [
        (False, "sent"),
        (True, "sent"),
    ]


async def test_a_result_too_large_to_store_is_read_again(crew_server: Any, key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.records.results.LARGEST", 8000)
    server = crew_server(script({"output": "{{ 'x' * 9000 }}"}))
    for _ in range(2):
        assert len((await again(server, key)).output) == 9000
    server.faults.add("status:forgotten")
    with pytest.raises(pc.CrewLostError, match="it has completed, but the server has forgotten the result"):
        await again(server, key)


async def test_a_misfitting_result_is_kept(crew_server: CrewServerFactory, key: str):
    server, text = crew_server(script({"output": '{"city": "Lisbon"}'})), '{"city": "Lisbon"}'
    trip = create_model("Trip", city=str, days=int)
    with pytest.raises(pc.OutputTypeError, match=r"does not fit Trip: days: Field required.*The text: \{\"city\""):
        await pc.arun_crew(server.crew(), idempotency_key=key, output_type=trip)
    assert (await pc.arun_crew(server.crew(), idempotency_key=key)).output == text
    assert server.kickoffs == 1


# Runs of others


async def test_a_run_without_record_is_stopped_once_late(slow_server: CrewServer):
    async with slow_server.crew().client() as client:
        run = pc.CrewRun(slow_server.crew(), await client.kickoff({}))
    waiting = asyncio.ensure_future(run.await_for_completion())
    await until(lambda: slow_server.requests["status"], "it is waited for")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert slow_server.requests["stop"] == 0, "nobody cancelled a flow run"
    with pytest.raises(pc.CrewTimeoutError, match="It was stopped"):
        await run.await_for_completion(STOPPING)
    assert slow_server.requests["stop"] == 1
    assert await RECORDS.of_kickoff(run.kickoff_id) is None


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
        assert (await ended(run)).output == "well done"
    assert caplog.text.count("has the state 'MARINATING', which is not documented") == 1
    assert "Crew run r1: plan (50%)" in caplog.text


# The artifact


async def shown(seen: Seen, server: CrewServer, crew: pc.DeployedCrew) -> str:
    """Return the page of the only run of a server, "" where it has none."""
    pages = await asyncio.to_thread(seen.artifacts, artifact_key(crew_of(crew).label))
    ids = [run.id for run in server.runs]
    return next((page["data"] for page in pages if ids and ids[0] in page["description"]), "")


async def test_a_page_comes_before_the_first_look(slow_server: CrewServer, seen: Seen, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.runs.polling.fast_intervals", [])
    crew = slow_server.crew(wait=pc.WaitPolicy(initial=60))
    running = asyncio.ensure_future(pc.arun_crew(crew, {}))
    page = await until(lambda: shown(seen, slow_server, crew), "its page")
    assert "pending" in page, "no status was seen yet"
    assert slow_server.requests["status"] == 0
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize("show", ["full", "summary"])
async def test_a_lasting_error_ends_the_wait(server: CrewServer, seen: Seen, key: str, show: Any):
    server.faults.add("status:html")
    crew = server.crew(show=show, wait=pc.WaitPolicy(initial=0.1, error_timeout=0.3))
    with pytest.raises(pc.ResponseFormatError) as caught:
        await pc.arun_crew(crew, {}, idempotency_key=key)
    assert caught.value.kickoff_id == server.runs[0].id
    assert f"Call again with idempotency key {key!r} to wait for it" in str(caught.value)
    page = await shown(seen, server, crew)
    assert (str(caught.value)[:60] in page) is (show == "full"), page
    assert ("Expected the status of this run" if show == "full" else "gives no answer") in page
    server.faults.clear()
    assert (await again(server, key)).output == "done"
    assert server.kickoffs == 1


async def test_a_late_page_holds_no_polls(crew_server: Any, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, seen: Seen):
    monkeypatch.setattr("prefect_crew.runs.wait.SHOW_EVERY", 0.0)
    free, take, shows = asyncio.Event(), prefect_api._Turns.turn, list[Any]()

    @contextlib.asynccontextmanager
    async def late(self: Any, urgency: prefect_api.Urgency, **options: Any) -> AsyncIterator[None]:
        if urgency is prefect_api.Urgency.SHOW:
            shows.append(urgency)
            await free.wait()
        async with take(self, urgency, **options):
            yield

    monkeypatch.setattr(prefect_api._Turns, "turn", late)
    server = crew_server(held := Held())
    crew = server.crew()
    running = asyncio.ensure_future(pc.arun_crew(crew, {}))
    await until(lambda: server.requests["status"] > 3, "the run is polled while its page waits for its turn")
    held.release()
    await until(lambda: len(shows) > 1, "its end is to be shown", seconds=15)  # the first gives up after 30
    assert proxy.count("/api/artifacts") == 0
    free.set()
    assert (await running).output == "done"
    assert proxy.count("/api/artifacts") == 1
    assert "completed" in await shown(seen, server, crew)


# A Prefect API that is away


async def test_an_unsaved_note_does_not_hold_the_polls(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server(script({"name": "draft", "output": "a draft", "human": True}))
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
