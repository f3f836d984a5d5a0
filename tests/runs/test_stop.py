"""A crew is stopped where the flow run that started it is cancelled, or has ended; else it is left running."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from prefect import flow, get_client
from prefect.context import AsyncClientContext
from prefect.deployments import run_deployment
from prefect.flow_engine import run_flow_async
from prefect.runtime import flow_run
from prefect.states import Cancelling, Scheduled

import prefect_crew as pc
from prefect_crew._internal.flow_engine import Ending, HeldFlowRun
from prefect_crew._internal.prefect_api import held_flow_run
from prefect_crew.blocks import crew_of
from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import StopAnswer, StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.records import variables
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import stop
from prefect_crew.runs.limits import take_slots
from prefect_crew.runs.run import LiveRun
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.held import Held
from support.limits import new_limit
from support.prefect_server import PrefectServer
from support.processes import Process
from support.proxy import through
from support.records import key, new_record, phases, put, record_of
from support.scripts import script as scripted
from support.scripts import slow
from support.seen import Seen
from support.waiting import until, wait_until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "quick_look")


@pytest.fixture
def started_by_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid.uuid4()))


def cancelled(
    server: Any, seen: Seen, call: Callable[[], Any], *, when: Callable[[], Any] | None = None, mode: str = "async"
) -> tuple[pc.CrewError | None, str]:
    """Call something in a flow run that is cancelled once the crew's server was asked for a status; return the error
    and the flow run's id."""
    ids: list[str] = []

    @flow
    async def trip() -> None:
        ids.append(str(flow_run.id))
        await call()

    @flow
    def sync_trip() -> None:
        ids.append(str(flow_run.id))
        call()

    def cancel() -> None:
        wait_until(when or (lambda: server.requests["status"]))
        seen.set_state(ids[0], "CANCELLING")

    thread, error = threading.Thread(target=cancel), None
    thread.start()
    try:
        asyncio.run(asyncio.wait_for(trip(), 90)) if mode == "async" else sync_trip()
    except pc.CrewError as raised:
        error = raised
    thread.join()
    return error, ids[0]


# A local run, which nobody tells that it was cancelled


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_local_run_notices_its_cancellation(crew_server: CrewServerFactory, seen: Seen, mode: str):
    server, idempotency_key = crew_server(slow(60)), key()
    call = partial(pc.arun_crew if mode == "async" else pc.run_crew, server.crew(), idempotency_key=idempotency_key)
    error, flow_run_id = cancelled(server, seen, call, mode=mode)
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1
    assert seen.record(idempotency_key)["state"] == "stopped"
    # The server ends it as Cancelled, after five minutes.
    assert seen.flow_run(flow_run_id)["state"]["type"] == "CANCELLING"


def test_cancelling_a_flow_stops_its_subflows(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60))

    @flow
    async def city() -> None:
        await pc.arun_crew(server.crew())

    error, _ = cancelled(server, seen, city)
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1


def test_two_waits_stop_a_run_once(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key, ends = crew_server(slow(60), faults=["stop:latency=0.5"]), key(), list[Any]()

    async def two() -> None:
        waits = (pc.arun_crew(server.crew(), idempotency_key=idempotency_key) for _ in range(2))
        ends.extend(await asyncio.gather(*waits, return_exceptions=True))

    cancelled(server, seen, two, when=lambda: server.requests["status"] >= 4)
    assert [type(end) for end in ends] == [pc.CrewStoppedError, pc.CrewStoppedError]
    assert server.requests["stop"] == 1


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_stop_is_recorded_before_it_is_sent(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["stop:500"])
    asyncio.run(cancelled_midway(server, seen, "CANCELLING"))
    record = seen.record(next(iter(server.kickoffs_by_key)))
    assert record["reason"] == "stop was asked for", "its answer says nothing, and it is not sent again"


def test_a_cancelled_flow_starts_nothing_more(crew_server: CrewServerFactory, seen: Seen):
    server, errors = crew_server(slow(60)), list[pc.CrewError]()

    async def trips() -> None:
        for city in ("Lisbon", "Porto", "Faro"):
            try:
                await pc.arun_crew(server.crew(), {"city": city})
            except pc.CrewError as error:
                errors.append(error)

    cancelled(server, seen, trips)
    assert server.kickoffs == 1
    assert [type(error) for error in errors] == [
        pc.CrewStoppedError,
        pc.FlowRunCancelledError,
        pc.FlowRunCancelledError,
    ]
    assert "was cancelled, so no run was started" in str(errors[1])


WITHIN_A_LONG_PAUSE = pc.WaitPolicy(initial=0.1, factor=1000, max_interval=300)


def test_a_cancellation_is_noticed_in_trouble(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["status:429@1-"])
    error, _ = cancelled(server, seen, lambda: pc.arun_crew(server.crew(), wait=WITHIN_A_LONG_PAUSE))
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1


def test_a_cancellation_is_noticed_in_a_pause(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prefect_crew.runs.polling.fast_intervals", [])
    server = crew_server(slow(60))
    error, _ = cancelled(server, seen, lambda: pc.arun_crew(server.crew(), wait=WITHIN_A_LONG_PAUSE))
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["status"] == 2, "the wait, and whoever stopped it: what it had used"


def test_a_crew_without_stop_runs_on(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server(slow(60), stop=False), key()
    error, flow_run_id = cancelled(server, seen, lambda: pc.arun_crew(server.crew(), idempotency_key=idempotency_key))
    assert not isinstance(error, pc.CrewStoppedError)
    assert f"which continues at {server.url}" in str(error)
    assert f"continues at {server.url}: its server has no /stop" in seen.logs(flow_run_id)
    record = seen.record(idempotency_key)
    assert (record["phase"], record["reason"]) == ("started", "stop was asked for: unsupported")


# Who started the run


@pytest.mark.parametrize("what", ["the flow run that started it", "a flow run that waits for it as well"])
def test_a_shared_run_stops_with_its_owner(crew_server: CrewServerFactory, seen: Seen, what: str):
    is_owner = what == "the flow run that started it"
    server, idempotency_key = crew_server(slow(60 if is_owner else 8)), key()
    ended, ids, before = list[Any](), list[str](), list[int]()

    async def run(*, first: bool) -> str:
        if not first:
            await until(lambda: server.requests["status"], "the first one waits")
            before.append(server.requests["status"])
        return (await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)).output

    @flow
    async def other() -> None:
        ids.append(str(flow_run.id))
        try:
            ended.append(await run(first=not is_owner))
        except pc.CrewError as error:
            ended.append(type(error))

    def both_wait() -> bool:
        return bool(before) and server.requests["status"] > before[0] + 10

    thread = threading.Thread(target=lambda: asyncio.run(other()))
    thread.start()
    error, flow_run_id = cancelled(server, seen, lambda: run(first=is_owner), when=both_wait)
    thread.join()
    assert server.kickoffs == 1
    if is_owner:
        assert (type(error), ended) == (pc.CrewStoppedError, [pc.CrewStoppedError])
        assert server.requests["stop"] == 1
        return
    assert (ended, server.requests["stop"]) == (["done"], 0)
    assert "continues at" in str(error)
    assert f"flow run {ids[0]} started it and has not ended" in seen.logs(flow_run_id)
    assert "prefect-crew runs cancel " in seen.logs(flow_run_id)


@pytest.mark.parametrize("owner", ["ended", "a subflow of a cancelled flow run"])
def test_a_run_without_owner_stops_with_its_waiter(crew_server: CrewServerFactory, seen: Seen, owner: str):
    server, kickoff_ids, ids = crew_server(slow(60)), list[str](), list[str]()

    @flow
    async def start() -> None:
        ids.append(str(flow_run.id))
        kickoff_ids.append(await pc.kickoff_crew(server.crew()))

    async def call() -> None:
        await start()
        if owner != "ended":  # as one whose process was killed
            await asyncio.to_thread(seen.set_state, ids[0], "RUNNING")
        await pc.wait_for_crew(server.crew(), str(kickoff_ids[0]))

    error, _ = cancelled(server, seen, call)
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1


def test_a_silent_prefect_api_is_no_cancellation(crew_server: CrewServerFactory, prefect_server: PrefectServer):
    server = crew_server(Held(until=lambda _: proxy.count("GET /api/flow_runs") > 2))

    @flow
    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(server.crew())
        proxy.refuse = "GET /api/flow_runs"
        try:
            return (await pc.wait_for_crew(server.crew(), kickoff_id)).output
        finally:
            proxy.refuse = None

    with through(prefect_server) as proxy:
        assert asyncio.run(trip()) == "done"
        assert proxy.count("GET /api/flow_runs") > 2


def test_a_retried_flow_run_may_complete(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60))

    async def two() -> None:
        await asyncio.gather(*(pc.arun_crew(server.crew(), {"n": number}) for number in range(2)))

    error, flow_run_id = cancelled(server, seen, two)
    assert error is not None

    @flow
    async def again() -> str:
        return (await pc.arun_crew(crew_server("echo").crew(), {"text": "again"})).output

    async def retried() -> Any:
        async with get_client() as client:
            await client.set_flow_run_state(uuid.UUID(flow_run_id), Scheduled(), force=True)
            planned = await client.read_flow_run(uuid.UUID(flow_run_id))
        return await run_flow_async(again, flow_run=planned, parameters={})

    assert asyncio.run(retried()) == "again"
    assert seen.flow_run(flow_run_id)["state"]["type"] == "COMPLETED"


# A run under a runner, which gets a cancellation like any other


async def cancelled_midway(
    server: Any,
    seen: Seen,
    kind: str | None,
    *,
    at: str = "status",
    when: Callable[[], Any] | None = None,
    is_cancelled_again: bool = False,
    idempotency_key: str | None = None,
    concurrency_limit: str | None = None,
    **policy: Any,
) -> str:
    """Run a crew in a flow, put the flow run into a state at a request, cancel the task as a runner's signal does.

    `is_cancelled_again`: cancel it a second time during the stop, as a crew worker does.
    """
    ids: list[Any] = []

    @flow
    async def trip() -> None:
        ids.append(flow_run.id)
        crew = server.crew(wait=pc.WaitPolicy(**policy), concurrency_limit=concurrency_limit)
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=idempotency_key)

    running = asyncio.ensure_future(trip())
    await until(when or (lambda: server.requests[at]), "the request is made")
    if kind:
        await asyncio.to_thread(seen.set_state, ids[0], kind)
    running.cancel()
    if is_cancelled_again:
        await until(lambda: server.requests["stop"], "the crew is asked to stop")
        running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return str(ids[0])


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_cancelled_flow_run_stops_its_crew(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60))
    asyncio.run(cancelled_midway(server, seen, "CANCELLING"))
    assert server.requests["stop"] == 1
    assert str(server.runs[0].state) == "stopped"
    record = RunRecord.model_validate(seen.record(next(iter(server.kickoffs_by_key))))
    assert str(record.state) == "stopped"
    assert [event["event"] for event in seen.events(server.runs[0].id)][-1] == "crew.stopped"


def hang(monkeypatch: pytest.MonkeyPatch, place: str) -> Callable[[], bool]:
    """Let a coroutine function hang; return a function that returns whether it was called."""
    calls: list[bool] = []

    async def hanging(*_: Any) -> None:
        calls.append(True)
        await asyncio.Event().wait()

    monkeypatch.setattr(place, hanging)
    return lambda: bool(calls)


@pytest.mark.usefixtures("started_by_a_runner")
@pytest.mark.parametrize("place", ["prefect_crew.tasks.wait_for_run", "prefect_crew.runs.wait.slot_of"])
def test_a_flow_run_cancelled_before_the_wait_stops_its_crew(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch, place: str
):
    server, limit = crew_server(slow(60)), asyncio.run(new_limit(1))
    when = hang(monkeypatch, place)
    asyncio.run(cancelled_midway(server, seen, "CANCELLING", when=when, concurrency_limit=limit))
    assert server.requests["stop"] == 1


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_second_cancellation_cuts_no_stop_off(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(slow(60), faults=["stop:latency=1"])
    when = hang(monkeypatch, "prefect_crew.tasks.wait_for_run")
    asyncio.run(cancelled_midway(server, seen, "CANCELLING", when=when, is_cancelled_again=True))
    assert seen.record(next(iter(server.kickoffs_by_key)))["state"] == "stopped"


@pytest.mark.usefixtures("started_by_a_runner")
def test_an_ended_run_is_not_called_left_running(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    server, idempotency_key = crew_server("echo"), key()
    pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key)
    when = hang(monkeypatch, "prefect_crew.tasks.wait_for_run")
    flow_run_id = asyncio.run(cancelled_midway(server, seen, None, when=when, idempotency_key=idempotency_key))
    assert "is left running" not in seen.logs(flow_run_id)


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_stop_at_a_timeout_is_sent_once(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["stop:latency=20"])
    asyncio.run(cancelled_midway(server, seen, "CANCELLING", at="stop", timeout=0.2, on_timeout="stop"))
    assert server.requests["stop"] == 1


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_worker_shutdown_leaves_the_crew_running(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60))
    flow_run_id = asyncio.run(cancelled_midway(server, seen, None))
    assert server.requests["stop"] == 0
    assert str(server.runs[0].state) == "running"
    idempotency_key = next(iter(server.kickoffs_by_key))
    assert seen.record(idempotency_key)["phase"] == "started"
    logs = seen.logs(flow_run_id)
    assert f"is left running at {server.url}: its flow run was not cancelled" in logs
    assert idempotency_key in logs


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_failed_stop_is_logged(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["stop:500"])
    flow_run_id = asyncio.run(cancelled_midway(server, seen, "CANCELLING"))
    assert server.requests["stop"] == 1
    assert f"could not be stopped (ServerError: POST /stop/{server.runs[0].id} answered 500" in seen.logs(flow_run_id)


@pytest.mark.usefixtures("started_by_a_runner")
def test_a_run_that_ended_meanwhile_stays_open(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(slow(60), faults=["stop:latency=0.5"])
    idempotency_key: list[str] = []

    async def cancel() -> None:
        await cancelled_midway(server, seen, "CANCELLING")

    async def both() -> None:
        cancelling = asyncio.ensure_future(cancel())
        await until(lambda: server.requests["stop"], "the crew is asked to stop")
        idempotency_key.extend(server.kickoffs_by_key)
        async with server.crew().client() as client:
            server.faults.clear()
            await client.stop(server.runs[0].id)
        await cancelling

    asyncio.run(both())
    assert seen.record(idempotency_key[0])["phase"] == "started"


# Calls that outlive a flow run which a crew worker has ended


async def outlived(
    server: CrewServer, is_time: Callable[[], Any], *, ending: Ending = "cancelled", **options: Any
) -> Any:
    """Spawn a call in a subflow of a flow run, and end that once it is time; return the call's end."""
    calls, ids, held = list[asyncio.Task[Any]](), list[str](), HeldFlowRun(cast("Any", None), cast("Any", None))

    @flow
    async def city() -> None:
        crew = server.crew(concurrency_limit=options.pop("limit", None))
        calls.append(asyncio.create_task(pc.arun_crew(crew, {"text": "a"}, **options)))

    @flow
    async def trip() -> None:
        held_flow_run.set(held)
        ids.append(str(flow_run.id))
        await city()
        await until(is_time, "it is time")

    async with AsyncClientContext.get_or_create() as shared:  # as of a worker
        await asyncio.create_task(trip())
        if ending == "cancelled":
            await shared.client.set_flow_run_state(uuid.UUID(ids[0]), Cancelling(), force=True)
        held.end(ending, "The flow run has ended here.")
        (end,) = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
    return end


@pytest.mark.usefixtures("started_by_a_runner")
@pytest.mark.parametrize(
    ("fault", "request_of_it", "kept"),
    [("inputs:latency=1", "inputs", []), ("kickoff:429=2", "kickoff", [RecordPhase.NOT_STARTED])],
)
@pytest.mark.parametrize("ending", ["cancelled", "suspended"])
async def test_a_call_that_outlives_its_flow_run_takes_no_permit(
    crew_server: CrewServerFactory, fault: str, request_of_it: str, kept: list[RecordPhase], ending: Ending
):
    server, idempotency_key = crew_server("echo", faults=[fault]), key()
    about: dict[str, Any] = {"idempotency_key": idempotency_key, "ending": ending}
    end = await outlived(server, lambda: server.requests[request_of_it], **about)
    if ending == "cancelled":
        assert isinstance(end, pc.FlowRunCancelledError), end
        assert "no run was started" in str(end)
    else:
        assert isinstance(end, asyncio.CancelledError), end
    assert server.requests["kickoff"] == len(kept), "it is not sent again"
    assert await phases(idempotency_key) == kept


@pytest.mark.usefixtures("started_by_a_runner")
async def test_a_call_that_outlives_its_flow_run_sends_no_kickoff(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    connecting, idempotency_key = asyncio.Event(), key()

    async def kickoff(*_: Any, before_sending: Callable[[], None], **__: Any) -> str:
        connecting.set()
        await asyncio.sleep(1)
        before_sending()
        return "sent"

    monkeypatch.setattr(CrewClient, "kickoff", kickoff)
    end = await outlived(crew_server("echo"), connecting.is_set, idempotency_key=idempotency_key)
    assert isinstance(end, pc.FlowRunCancelledError), end
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


@pytest.mark.usefixtures("started_by_a_runner")
async def test_a_call_that_outlives_its_flow_run_waits_for_no_slot(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, limit = crew_server("echo"), await new_limit(1)
    await take_slots(crew_of(server.crew(concurrency_limit=limit)))
    end = await outlived(server, lambda: "Waiting for a slot" in caplog.text, limit=limit)
    assert isinstance(end, pc.FlowRunCancelledError), end
    assert server.kickoffs == 0


@pytest.mark.usefixtures("started_by_a_runner")
async def test_a_call_that_outlives_a_suspended_flow_run_gives_its_slot_back(crew_server: CrewServerFactory):
    server, limit = crew_server("echo", faults=["inputs:latency=1"]), await new_limit(1)
    end = await outlived(server, lambda: server.requests["inputs"], ending="suspended", limit=limit)
    assert isinstance(end, asyncio.CancelledError), end
    await asyncio.wait_for(take_slots(crew_of(server.crew(concurrency_limit=limit))), 5)


@pytest.mark.usefixtures("started_by_a_runner")
async def test_a_call_that_outlives_its_flow_run_waits_for_no_turn(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, session = crew_server(scripted({"seconds": 60}, inputs=["text"], flow=True)), key()
    await server.crew().atrigger({"text": "first"}, session=session)
    end = await outlived(server, lambda: "this call waits for turn" in caplog.text, session=session)
    assert isinstance(end, pc.FlowRunCancelledError), end
    assert (server.kickoffs, server.requests["stop"]) == (1, 0)


@pytest.mark.usefixtures("started_by_a_runner")
@pytest.mark.parametrize("request_of_it", ["kickoff", "status"])
async def test_a_call_that_outlives_its_flow_run_stops_its_crew(crew_server: CrewServerFactory, request_of_it: str):
    server = crew_server(slow(60), faults=["kickoff:latency=1"])
    end = await outlived(server, lambda: server.requests[request_of_it])
    assert isinstance(end, pc.CrewStoppedError), end
    assert (server.kickoffs, server.requests["stop"]) == (1, 1)


# Scripts


SCRIPT = """
import asyncio, os
from prefect import flow
from prefect_crew import DeployedCrew, arun_crew, kickoff_crew, run_crew, wait_for_crew

crew = DeployedCrew(url=os.environ["CREW_URL"], token=os.environ["CREW_TOKEN"])
options = {"idempotency_key": os.environ["KEY"] or None}

@flow
def sync_flow():
    wait_for_crew(crew, kickoff_crew(crew, {"text": "a"}, **options))

@flow
async def async_flow():
    await arun_crew(crew, {"text": "a"}, **options)

@flow
async def around():
    sync_flow()

match os.environ["KIND"]:
    case "script":
        run_crew(crew, {"text": "a"}, **options)
    case "sync flow":
        sync_flow()
    case "async flow":
        asyncio.run(async_flow())
    case "sync flow in an async one":
        asyncio.run(around())
"""


@pytest.fixture
def script(prefect_server: PrefectServer, tmp_path: Path) -> Any:
    """Give a function that starts a plain script, which runs a crew with an idempotency key."""
    processes: list[Process] = []

    def start(server: CrewServer, idempotency_key: str, kind: str = "script") -> Process:
        env = prefect_server.env(
            home=tmp_path / "home",
            CREW_URL=server.url,
            CREW_TOKEN=server.token,
            KEY=idempotency_key,
            KIND=kind,
            PYTHONUNBUFFERED="1",
        )
        source = tmp_path / "script.py"
        source.write_text(textwrap.dedent(SCRIPT))
        processes.append(Process([sys.executable, source], log=tmp_path / "log", env=env))
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


@pytest.mark.programs
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("script", "waiting"),
        ("script", "posting"),
        ("sync flow", "waiting"),
        ("async flow", "waiting"),
        ("sync flow in an async one", "waiting"),
    ],
)
def test_ctrl_c_leaves_the_crew_running(
    crew_server: CrewServerFactory, script: Any, seen: Seen, kind: str, moment: str
):
    faults = ["kickoff:latency=2", "kickoff:stuck"] if moment == "posting" else ["kickoff:stuck"]
    server, idempotency_key = crew_server("echo", faults=faults), key()
    process = script(server, idempotency_key, kind)
    wait_until(lambda: server.requests["kickoff" if moment == "posting" else "status"])
    process.send(signal.SIGINT)
    assert process.wait(60) != 0
    (run,) = server.runs
    assert (str(run.state), server.requests["stop"]) == ("running", 0), process.output
    record = seen.record(idempotency_key)
    assert (record["phase"], record["kickoff_id"]) == ("started", run.id)
    assert f"Crew run {run.id} is left running" in process.output
    assert f"idempotency key {idempotency_key!r} waits for it" in process.output
    assert f"prefect-crew runs cancel {run.id} --crew {server.url}" in process.output


@pytest.mark.programs
def test_the_logged_key_finds_the_run(crew_server: CrewServerFactory, script: Any, tmp_path: Path):
    server = crew_server(slow(20))
    process = script(server, "")
    wait_until(lambda: server.requests["status"])
    process.send(signal.SIGINT)
    assert process.wait(60) != 0
    found = re.search(r"A call with idempotency key '(.+?)' waits for it", process.output)
    assert found is not None, process.output
    assert pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=found[1]).output == "done"
    assert server.kickoffs == 1


@pytest.mark.programs
def test_sigterm_leaves_the_crew_running(crew_server: CrewServerFactory, script: Any, seen: Seen):
    server, idempotency_key = crew_server(slow(20)), key()
    process = script(server, idempotency_key)
    wait_until(lambda: server.requests["status"])
    process.send(signal.SIGTERM)
    assert process.wait(60) != 0
    assert server.requests["stop"] == 0
    assert seen.record(idempotency_key)["phase"] == "started"
    assert pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key).output == "done"
    assert server.kickoffs == 1


# From outside of the wait


async def test_a_stopped_run_is_closed_on_record(crew_server: CrewServerFactory):
    server = crew_server(slow(60))
    run = await server.crew(price=0.25).atrigger({})
    answer = await run.astop()
    assert (answer.outcome, answer.accepted) == (StopOutcome.STOPPED, True)
    record = await record_of(run.kickoff_id)
    assert (record.phase, record.state, record.cost) == (RecordPhase.ENDED, CrewState.STOPPED, 0.25)
    assert record.ended_at is not None
    with pytest.raises(pc.CrewStoppedError):
        await run.await_for_completion()


async def test_a_run_that_completes_at_its_stop_keeps_its_result(crew_server: CrewServerFactory):
    server = crew_server(slow(0.1))
    run = await server.crew().atrigger({})
    record = await record_of(run.kickoff_id)
    await until(lambda: str(server.runs[0].state) == "completed", "the run ends")
    async with server.crew().client() as client:
        answer = StopAnswer(kickoff_id=run.kickoff_id, outcome=StopOutcome.STOPPED)
        await stop.close_stopped(client, crew_of(server.crew()), record, answer, PrefectRecords())
    await run.await_for_completion()
    assert (await record_of(run.kickoff_id)).state is CrewState.COMPLETED


async def test_a_hanging_status_undoes_no_stop(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "LOOK_WITHIN", 0.2)
    run = await crew_server(slow(60), faults=["status:timeout"]).crew().atrigger({})
    async with asyncio.timeout(5):
        assert (await run.astop()).outcome is StopOutcome.STOPPED
    record = await record_of(run.kickoff_id)
    assert (record.phase, record.state) == (RecordPhase.ENDED, CrewState.STOPPED)


async def test_stopping_leaves_the_wait_what_it_needs(crew_server: CrewServerFactory):
    server = crew_server(slow(0.5), stop=False)
    run = await server.crew(secret_inputs=["pin"]).atrigger({"pin": "4711471"})
    assert (await run.astop()).outcome is StopOutcome.UNSUPPORTED
    await run.await_for_completion()
    assert (await run.afetch_result()).output == "done"
    record = await record_of(run.kickoff_id)
    assert record.result is not None, "the secret inputs are known to this process, so the result may be kept"


@pytest.mark.parametrize(
    ("script", "options", "outcome", "of_nobody"),
    [
        ("echo", {}, StopOutcome.NOT_STOPPABLE, StopOutcome.UNKNOWN_RUN),
        (slow(60), {"stop": False}, StopOutcome.UNSUPPORTED, StopOutcome.UNSUPPORTED),
    ],
    ids=["ended", "no stop"],
)
async def test_a_refused_stop_changes_nothing(
    crew_server: CrewServerFactory, script: str, options: dict[str, Any], outcome: StopOutcome, of_nobody: StopOutcome
):
    server = crew_server(script, **options)
    run = await server.crew().atrigger({"text": "a"})
    answer = await run.astop()
    assert (answer.outcome, answer.accepted) == (outcome, False)
    assert (await pc.CrewRun(server.crew(), "nobody").astop()).outcome is of_nobody
    record = await record_of(run.kickoff_id)
    assert record.phase is RecordPhase.STARTED


async def test_a_server_that_cannot_be_asked_is_an_error(crew_server: CrewServerFactory):
    server = crew_server(slow(60), faults=["stop:500"])
    run = await server.crew().atrigger({})
    with pytest.raises(pc.CrewAPIError, match="500"):
        await run.astop()
    assert server.requests["stop"] == 1


async def test_stop_and_resume_take_up_a_rotated_token(crew_server: CrewServerFactory):
    server, name = crew_server(Held("draft", "print"), response_format="union"), f"actions-{uuid.uuid4().hex[:8]}"
    await server.crew().asave(name)
    run = await (await pc.DeployedCrew.aload(name)).atrigger({})
    await until(lambda: server.run(run.kickoff_id).state is CrewState.WAITING, "a person is waited for")
    server.token = "the-new-token"
    with pytest.raises(pc.AuthenticationError):
        await run.astop()
    await server.crew().asave(name, overwrite=True)
    assert (await run.aresume("fine", approve=True)).status == "resumed"
    assert (await run.astop()).accepted


async def test_an_unrecorded_stop_is_reported(
    crew_server: CrewServerFactory, prefect_server: PrefectServer, caplog: pytest.LogCaptureFixture
):
    run = await crew_server(slow(60)).crew().atrigger({})

    def refused() -> Any:
        with through(prefect_server) as proxy:
            proxy.refuse = "POST /api/variables/$"
            return asyncio.run(stop.stop_run(LiveRun(run._crew, run.kickoff_id)))

    assert (await asyncio.to_thread(refused)).accepted
    assert f"It could not be recorded that run {run.kickoff_id} was stopped" in caplog.text


# The runs of a flow run


async def started(server: CrewServer) -> tuple[uuid.UUID, str, str]:
    """Kick a crew off in a flow and, with another key, in a subflow of it; return the flow run and the kickoff ids."""
    ids: list[Any] = []

    @flow
    async def city() -> None:
        ids.append(await pc.kickoff_crew(server.crew(show="none", secret_inputs=["pin"]), {"pin": "4711471"}))

    @flow
    async def trip() -> None:
        ids.append(flow_run.id)
        ids.append(await pc.kickoff_crew(server.crew()))
        await city()

    await trip()
    return uuid.UUID(ids[0]), str(ids[1]), str(ids[2])


async def open_ids(flow_run_id: uuid.UUID) -> set[str]:
    async with get_client() as client:
        return {
            str(record.kickoff_id)
            for record in await stop.open_runs_of(client, await client.read_flow_run(flow_run_id))
        }


async def test_runs_are_found_by_artifacts(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "LATEST", 0)
    server = crew_server(slow(60))
    await pc.kickoff_crew(server.crew())  # somebody else's
    flow_run_id, *kickoff_ids = await started(server)
    assert await open_ids(flow_run_id) == set(kickoff_ids)
    await stop.stop_run(LiveRun(crew_of(server.crew()), kickoff_ids[0]))
    assert await open_ids(flow_run_id) == {kickoff_ids[1]}


async def test_a_flow_run_of_a_deployment_runs_by_itself(seen: Seen):
    ids, name = list[Any](), f"deployed-{uuid.uuid4().hex[:8]}"

    @flow(name=name)
    async def trip() -> None:
        ids.append(str(flow_run.id))
        ids.append(str((await cast("Any", run_deployment(f"{name}/{name}", timeout=0))).id))

    async with get_client() as client:
        await client.create_deployment(await client.create_flow(trip), name=name)
    await trip()
    own, deployed = ids
    assert deployed in [child["id"] for child in seen.subflow_runs(own)]
    await put(new_record(phase=RecordPhase.STARTED, kickoff_id=str(uuid.uuid4()), flow_run_id=deployed))
    assert await open_ids(uuid.UUID(own)) == set()
    assert len(await open_ids(uuid.UUID(deployed))) == 1
    async with get_client() as client:
        await client.set_flow_run_state(uuid.UUID(own), Cancelling(), force=True)
    assert await stop.is_cancelled_on_server(own)
    assert not await stop.is_cancelled_on_server(deployed)


@pytest.mark.parametrize("most", [stop.LATEST, 0], ids=["by what changed last", "not without a look there"])
def test_a_run_without_artifact_is_found(
    crew_server: CrewServerFactory, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch, most: int
):
    monkeypatch.setattr(stop, "LATEST", most)
    server = crew_server(slow(60))
    with through(prefect_server) as proxy:
        proxy.refuse = "POST /api/artifacts/$"
        flow_run_id, *kickoff_ids = asyncio.run(started(server))
        assert proxy.requests.count("POST /api/artifacts/") == 2
    assert asyncio.run(open_ids(flow_run_id)) == (set(kickoff_ids) if most else set())


async def test_the_search_goes_back_to_the_flow_runs_start(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(variables, "PAGE", 2)
    monkeypatch.setattr(variables, "OVERLAP", 1)
    flow_run_id, *_ = await started(crew_server(slow(60)))
    async with get_client() as client:
        begun = await client.read_flow_run(flow_run_id)
    for _ in range(3):
        await put(new_record())
    monkeypatch.setattr(stop, "CLOCKS_APART", timedelta(0))
    owners = {str(begun.id)}
    assert begun.start_time is not None
    assert {claim.fields["flow_run_id"] for claim in await stop._latest_claims(begun.start_time, owners)} == owners
    assert await stop._latest_claims(utcnow(), owners) == []


def test_the_search_does_not_grow_with_records(crew_server: CrewServerFactory, prefect_server: PrefectServer):
    flow_run_id, *_ = asyncio.run(started(crew_server(slow(60))))
    with through(prefect_server) as proxy:
        asyncio.run(open_ids(flow_run_id))
        # The claims by their names, two pages of the latest changes, and for each key its attempts and their permits.
        assert proxy.count("POST /api/variables/filter") <= 1 + 2 + 2 * 2
        assert proxy.count("POST /api/artifacts/filter") == 1
        assert proxy.count("POST /api/flow_runs/filter") == 2
