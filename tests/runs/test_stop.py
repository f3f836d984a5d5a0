"""A crew is stopped where the flow run that started it is cancelled, or has ended; else it is left running."""

import asyncio
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from prefect import flow, get_client
from prefect.context import AsyncClientContext
from prefect.deployments import run_deployment
from prefect.flow_engine import run_flow_async
from prefect.runtime import flow_run
from prefect.states import Cancelling, Scheduled

import prefect_crew as pc
from prefect_crew._internal.prefect_api import HeldFlowRun, held_flow_run
from prefect_crew.blocks import crew_of
from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import StopAnswer, StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import StoreError
from prefect_crew.runs import stop
from prefect_crew.runs.database import in_store
from prefect_crew.runs.run import LiveRun
from prefect_crew.states import CrewState
from prefect_crew.store import attempts
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow, call_in_flow
from support.held import Held
from support.past import aput, new_attempt
from support.processes import Process
from support.proxy import Proxy
from support.scripts import FAILS, slow
from support.scripts import script as scripted
from support.seen import Seen
from support.waiting import soon, until, wait_until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "quick_look")


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that takes a minute."""
    return crew_server(slow(60))


async def stored(key: str) -> Attempt:
    """Return the one attempt of a key or kickoff id."""
    (attempt,) = await in_store(attempts.of_key, key) or await in_store(attempts.of_kickoff_id, key)
    return attempt


def cancelled(
    server: CrewServer,
    seen: Seen,
    call: Callable[[], Awaitable[Any]],
    *,
    when: Callable[[], Any] | None = None,
    state: str | None = "CANCELLING",
    by_signal: bool = False,
) -> tuple[Any, str]:
    """Call something in a flow run, and put that into a state once it is time (the run is polled). `by_signal`: cancel
    the task as well, as a runner does, and once more when the crew is asked to stop, as a crew worker does. Return the
    end of the flow run, its result or error, and its id."""
    ids: list[str] = []

    async def trip() -> None:
        ids.append(str(flow_run.id))
        await call()

    async def cancel() -> Any:
        running = asyncio.ensure_future(acall_in_flow(trip))
        await until(when or (lambda: server.requests["status"]), "it is time")
        if state:
            await asyncio.to_thread(seen.set_state, ids[0], state)
        if by_signal:
            running.cancel()
            await until(lambda: server.requests["stop"] or running.done(), "the crew is asked to stop")
            running.cancel()
        return (await soon(asyncio.gather(running, return_exceptions=True)))[0]

    return asyncio.run(cancel()), ids[0]


# A local run, which nobody tells that it was cancelled


def test_two_local_waits_stop_their_run_once(server: CrewServer, seen: Seen, key: str):
    server.faults.add("stop:latency=0.5")
    ends, waits = list[Any](), set[Any]()
    crew: Any = replace(crew_of(server.crew()), on_status=lambda run, _: waits.add(run))

    @flow
    def city() -> None:
        pc.run_crew(crew, idempotency_key=key)

    async def call() -> None:
        calls = [asyncio.to_thread(city), pc.arun_crew(crew, idempotency_key=key)]
        ends.extend(await asyncio.gather(*calls, return_exceptions=True))

    _, flow_run_id = cancelled(server, seen, call, when=lambda: len(waits) == 2)
    assert [type(end) for end in ends] == [pc.CrewStoppedError, pc.CrewStoppedError]
    assert server.kickoffs == 1
    assert server.requests["stop"] == 1
    assert asyncio.run(stored(key)).state is AttemptState.STOPPED
    # The server ends it as Cancelled, after five minutes.
    assert seen.flow_run(flow_run_id)["state"]["type"] == "CANCELLING"


@pytest.mark.parametrize("places", ["flow flow flow", "flow subflow subflow", "subflow flow subflow"])
def test_a_cancelled_flow_starts_nothing_more(server: CrewServer, seen: Seen, places: str):
    ends: list[Any] = []

    async def trip() -> None:
        ends.extend(await asyncio.gather(pc.arun_crew(server.crew()), return_exceptions=True))

    async def trips() -> None:
        for place in places.split():
            await (trip() if place == "flow" else flow(trip)())

    cancelled(server, seen, trips)
    assert server.kickoffs == 1
    assert [type(end) for end in ends] == [pc.CrewStoppedError, pc.FlowRunCancelledError, pc.FlowRunCancelledError]
    assert "was cancelled, so no run was started" in str(ends[1])


async def test_a_late_answer_forgets_no_cancellation(monkeypatch: pytest.MonkeyPatch):
    flow_run_id = str(uuid.uuid4())

    async def late(run_id: str | None) -> None:
        stop._asked[flow_run_id, 0] = time.monotonic(), True  # a subflow's wait has a later answer

    monkeypatch.setattr(stop, "cancelled_on_server", late)
    assert await stop.is_cancelled(flow_run_id, every=0.0)


@pytest.mark.parametrize("fault", ["status:429@1-", None])
def test_a_long_pause_sees_a_cancellation(server: CrewServer, seen: Seen, monkeypatch: Any, fault: str | None):
    if fault:
        server.faults.add(fault)
    else:
        monkeypatch.setattr("prefect_crew.runs.polling.fast_intervals", [])
    crew = server.crew(wait=pc.WaitPolicy(initial=0.1, factor=1000, max_interval=300))
    error, _ = cancelled(server, seen, lambda: pc.arun_crew(crew))
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1
    assert fault or server.requests["status"] == 2, "the wait, and whoever stopped it: what it had used"


@pytest.mark.parametrize(
    ("options", "log"),
    [
        ({"faults": ["stop:404"]}, "its server has no /stop"),
        ({"faults": ["stop:500"]}, "could not be stopped (CrewAPIError: POST /stop/"),
    ],
    ids=["no stop", "a server that fails"],
)
def test_a_crew_that_cannot_be_stopped_runs_on(
    crew_server: Any, seen: Seen, key: str, options: dict[str, Any], log: str
):
    server = crew_server(slow(60), **options)
    error, flow_run_id = cancelled(server, seen, lambda: pc.arun_crew(server.crew(), idempotency_key=key))
    assert isinstance(error, pc.FlowRunCancelledError)
    assert f"which continues at {server.url}" in str(error)
    assert log in seen.logs(flow_run_id)
    assert f"continues at {server.url}" in seen.logs(flow_run_id)
    attempt = asyncio.run(stored(key))
    assert attempt.state is AttemptState.STARTED
    assert attempt.stop_asked_at is not None, "noted before /stop is sent: a lost answer says nothing"
    assert server.requests["stop"] == ("faults" in options)


# Who started the run


@pytest.mark.parametrize("is_owner", [True, False], ids=["the owner", "another that waits"])
def test_a_shared_run_stops_with_its_owner(crew_server: CrewServerFactory, seen: Seen, key: str, is_owner: bool):
    server, ids = crew_server(held := Held()), list[str]()

    async def run() -> str:
        ids.append(str(flow_run.id))
        return (await pc.arun_crew(server.crew(), idempotency_key=key)).output

    async def both() -> list[Any]:
        runs = [asyncio.ensure_future(acall_in_flow(run))]
        await until(lambda: server.requests["status"], "the first one waits")
        runs.append(asyncio.ensure_future(acall_in_flow(run)))
        await until(lambda: len(ids) == 2, "the second one begins")
        polls = server.requests["status"]
        await until(lambda: server.requests["status"] > polls + 10, "both wait")
        cancelled = 0 if is_owner else 1
        await asyncio.to_thread(seen.set_state, ids[cancelled], "CANCELLING")
        await asyncio.wait({runs[cancelled]})
        held.release()
        return await asyncio.gather(*runs, return_exceptions=True)

    owner, waiter = asyncio.run(both())
    assert server.kickoffs == 1
    assert server.requests["stop"] == is_owner
    if is_owner:
        assert [type(owner), type(waiter)] == [pc.CrewStoppedError, pc.CrewStoppedError]
        return
    assert owner == (ids[0], "done")
    assert "continues at" in str(waiter)
    assert f"flow run {ids[0]} started it and has not ended" in seen.logs(ids[1])
    assert "prefect-crew runs cancel " in seen.logs(ids[1])


@pytest.mark.parametrize("owner", ["ended", "a subflow of a cancelled flow run"])
def test_a_run_without_owner_stops_with_its_waiter(server: CrewServer, seen: Seen, owner: str):
    async def call() -> None:
        owner_id, kickoff_id = await acall_in_flow(lambda: pc.kickoff_crew(server.crew()))
        if owner != "ended":  # as one whose process was killed
            await asyncio.to_thread(seen.set_state, owner_id, "RUNNING")
        await pc.wait_for_crew(server.crew(), kickoff_id)

    error, _ = cancelled(server, seen, call)
    assert isinstance(error, pc.CrewStoppedError)
    assert server.requests["stop"] == 1


def test_a_silent_prefect_api_is_no_cancellation(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server(Held(until=lambda _: proxy.count("GET /api/flow_runs") > 2))

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(server.crew())
        proxy.refuse = "GET /api/flow_runs"
        try:
            return (await pc.wait_for_crew(server.crew(), kickoff_id)).output
        finally:
            proxy.refuse = None

    assert call_in_flow(trip)[1] == "done"
    assert proxy.count("GET /api/flow_runs") > 2


def test_a_retried_flow_run_may_complete(server: CrewServer, crew_server: CrewServerFactory, seen: Seen):
    in_a_thread = partial(asyncio.to_thread, pc.run_crew, server.crew())
    error, flow_run_id = cancelled(server, seen, in_a_thread)
    assert isinstance(error, pc.CrewStoppedError)

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


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process look as if a runner had started it."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid.uuid4()))


def signalled(server: CrewServer, seen: Seen, key: str, *, crew: Any = None, **options: Any) -> str:
    """Run a crew in a flow run that is cancelled by a signal; return the flow run's id. `options`: of `cancelled`."""
    call = partial(pc.arun_crew, crew or server.crew(), {"text": "a"}, idempotency_key=key)
    end, flow_run_id = cancelled(server, seen, call, by_signal=True, **options)
    assert isinstance(end, asyncio.CancelledError)
    return flow_run_id


def hang(monkeypatch: pytest.MonkeyPatch, place: str) -> Callable[[], bool]:
    """Let a coroutine function hang; return a function that returns whether it was called."""
    calls: list[bool] = []

    async def hanging(*_: Any) -> None:
        calls.append(True)
        await asyncio.Event().wait()

    monkeypatch.setattr(place, hanging)
    return lambda: bool(calls)


@pytest.mark.parametrize("place", [None, "prefect_crew.tasks.wait_for_run"])
def test_a_cancelled_flow_run_stops_its_crew(
    runner: None, server: CrewServer, seen: Seen, key: str, monkeypatch: pytest.MonkeyPatch, place: str | None
):
    server.faults.add("stop:latency=1")
    signalled(server, seen, key, when=hang(monkeypatch, place) if place else None)
    assert server.requests["stop"] == 1
    assert str(server.runs[0].state) == "stopped"
    assert asyncio.run(stored(key)).state is AttemptState.STOPPED
    assert [event["event"] for event in seen.events(server.runs[0].id)][-1] == "crew.stopped"


def test_a_stop_at_a_timeout_is_sent_once(runner: None, server: CrewServer, seen: Seen, key: str):
    server.faults.add("stop:latency=20")
    crew = server.crew(wait=pc.WaitPolicy(timeout=0.2, on_timeout="stop"))
    signalled(server, seen, key, crew=crew, when=lambda: server.requests["stop"])
    assert server.requests["stop"] == 1


# Calls that outlive a flow run which a crew worker has ended


async def outlived(server: CrewServer, is_time: Callable[[], Any], *, suspend: bool = False, **options: Any) -> Any:
    """Spawn a call in a subflow of a flow run, and end that once it is time; return the call's end."""
    calls, held = list[asyncio.Task[Any]](), HeldFlowRun(cast("Any", None), asyncio.get_running_loop())
    crew = server.crew(concurrency_limit=options.pop("limit", None))

    async def spawn() -> None:
        calls.append(asyncio.create_task(pc.arun_crew(crew, {"text": "a"}, **options)))

    async def trip() -> None:
        held_flow_run.set(held)
        await acall_in_flow(spawn)
        await until(is_time, "it is time")

    async with AsyncClientContext.get_or_create() as shared:  # as of a worker
        flow_run_id, _ = await asyncio.create_task(acall_in_flow(trip))
        if not suspend:
            await shared.client.set_flow_run_state(uuid.UUID(flow_run_id), Cancelling(), force=True)
        held.end("suspended" if suspend else "cancelled", "The flow run has ended here.")
        (end,) = await soon(asyncio.gather(*calls, return_exceptions=True))
    return end


@pytest.mark.parametrize(
    ("fault", "request_of_it", "states"),
    [("inputs:latency=1", "inputs", []), ("kickoff:429=2", "kickoff", [AttemptState.NOT_STARTED])],
)
@pytest.mark.parametrize("suspend", [False, True], ids=["cancelled", "suspended"])
async def test_an_outliving_call_sends_no_kickoff(
    runner: None, crew_server: Any, key: str, fault: str, request_of_it: str, states: list[Any], suspend: bool
):
    server = crew_server("echo", faults=[fault])
    end = await outlived(server, lambda: server.requests[request_of_it], idempotency_key=key, suspend=suspend)
    assert type(end) is (asyncio.CancelledError if suspend else pc.FlowRunCancelledError)
    assert suspend or "no run was started" in str(end)
    assert server.requests["kickoff"] == len(states), "it is not sent again"
    assert [attempt.state for attempt in await in_store(attempts.of_key, key)] == states


@pytest.mark.parametrize("waits", ["room", "turn"])
async def test_an_outliving_call_waits_no_longer(
    runner: None, crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, key: str, waits: str
):
    server = crew_server(scripted({"seconds": 60}, inputs=["text"], flow=True))
    options: dict[str, Any] = {"limit": 1} if waits == "room" else {"session": key}
    await server.crew(concurrency_limit=options.get("limit")).atrigger(
        {"text": "first"}, session=options.get("session")
    )
    with caplog.at_level("INFO"):
        end = await outlived(server, lambda: "This call waits." in caplog.text, **options)
    assert isinstance(end, pc.FlowRunCancelledError), end
    assert server.kickoffs == 1
    assert server.requests["stop"] == 0


@pytest.mark.parametrize("request_of_it", ["kickoff", "status"])
async def test_an_outliving_call_stops_its_crew(runner: None, server: CrewServer, request_of_it: str):
    server.faults.add("kickoff:latency=1")
    end = await outlived(server, lambda: server.requests[request_of_it])
    assert isinstance(end, pc.CrewStoppedError), end
    assert server.kickoffs == 1
    assert server.requests["stop"] == 1


# Scripts


SCRIPT = """
import asyncio, os
from prefect import flow
from prefect_crew import DeployedCrew, arun_crew, kickoff_crew, run_crew, wait_for_crew

crew = DeployedCrew(url=os.environ["CREW_URL"], token=os.environ["CREW_TOKEN"])

@flow
def sync_flow():
    wait_for_crew(crew, kickoff_crew(crew, {"text": "a"}))

@flow
async def async_flow():
    await arun_crew(crew, {"text": "a"})

@flow
async def around():
    sync_flow()

{
    "script": lambda: run_crew(crew, {"text": "a"}),
    "async flow": lambda: asyncio.run(async_flow()),
    "sync flow in an async one": lambda: asyncio.run(around()),
}[os.environ["KIND"]]()
"""


@pytest.mark.programs
@pytest.mark.parametrize(
    ("kind", "moment", "number"),
    [
        ("script", "kickoff", signal.SIGINT),
        *((kind, "status", signal.SIGINT) for kind in ("async flow", "sync flow in an async one")),
        ("script", "status", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_the_crew_running(
    crew_server: Any, prefect_server: Any, tmp_path: Path, kind: str, moment: str, number: int
):
    server = crew_server(held := Held(), faults=["kickoff:latency=2"] if moment == "kickoff" else [])
    (tmp_path / "script.py").write_text(SCRIPT)
    env = prefect_server.env(home=tmp_path / "home", CREW_URL=server.url, CREW_TOKEN=server.token, KIND=kind)
    with Process([sys.executable, "-u", tmp_path / "script.py"], log=tmp_path / "log", env=env) as process:
        wait_until(lambda: server.requests[moment])
        process.send(number)
        assert process.wait() != 0
    (run,) = server.runs
    assert str(run.state) == "running"
    assert server.requests["stop"] == 0
    attempt = asyncio.run(stored(run.id))
    assert attempt.state is AttemptState.STARTED
    if number is signal.SIGINT:
        assert f"Crew run {run.id} is left running" in process.output
        assert f"prefect-crew runs cancel {run.id} --crew {server.url}" in process.output
        assert f"A call with idempotency key {attempt.key!r} waits for it" in process.output
    held.release()
    assert pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=attempt.key).output == "done"
    assert server.kickoffs == 1


# From outside of the wait


@pytest.mark.parametrize("fault", [None, "status:timeout"])
async def test_a_stopped_run_has_its_end(server: CrewServer, monkeypatch: pytest.MonkeyPatch, fault: str | None):
    run = await server.crew(secret_inputs=["pin"]).atrigger({"pin": "4711471"})
    if fault:
        server.faults.add(fault)
        monkeypatch.setattr(stop, "LOOK_WITHIN", 0.2)
    without_inputs = crew_of(server.crew(price=0.25))
    answers = [await soon(stop.stop_run(LiveRun(without_inputs, str(run.kickoff_id)))) for _ in range(2)]
    assert [answer.outcome for answer in answers] == [StopOutcome.STOPPED, StopOutcome.NOT_STOPPABLE]
    assert [answer.accepted for answer in answers] == [True, False]
    attempt = await stored(str(run.kickoff_id))
    assert (attempt.state, attempt.cost) == (AttemptState.STOPPED, 0.25)
    with pytest.raises(pc.CrewStoppedError):
        await run.await_for_completion()


@pytest.mark.parametrize("is_late", [False, True], ids=["the server refuses", "the server was late"])
async def test_a_run_that_completes_at_its_stop_keeps_its_result(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, is_late: bool
):
    server = crew_server(slow(0.1))
    run = await server.crew().atrigger({})
    await until(lambda: str(server.runs[0].state) == "completed", "the run ends")
    if is_late:
        answer = StopAnswer(kickoff_id=str(run.kickoff_id), outcome=StopOutcome.STOPPED)
        monkeypatch.setattr(CrewClient, "stop", AsyncMock(return_value=answer))
    assert (await run.astop()).accepted is is_late
    await run.await_for_completion()
    assert (await run.afetch_result()).output == "done"


async def test_a_run_that_fails_at_its_stop_has_failed(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    server = crew_server(FAILS)
    run = await server.crew().atrigger({})
    await until(lambda: str(server.runs[0].state) == "failed", "the run ends")
    answer = StopAnswer(kickoff_id=str(run.kickoff_id), outcome=StopOutcome.STOPPED)
    monkeypatch.setattr(CrewClient, "stop", AsyncMock(return_value=answer))
    assert (await run.astop()).accepted
    attempt = await stored(str(run.kickoff_id))
    assert (attempt.state, attempt.error) == (AttemptState.FAILED, "the search engine is down")
    with pytest.raises(pc.CrewFailedError):
        await run.await_for_completion()


async def test_stop_and_resume_take_up_a_rotated_token(crew_server: CrewServerFactory):
    server, name = crew_server(Held("draft", "print")), f"actions-{uuid.uuid4().hex[:8]}"
    await server.crew().asave(name)
    run = await (await pc.DeployedCrew.aload(name)).atrigger({})
    await until(lambda: server.run(run.kickoff_id).state is CrewState.WAITING, "a person is waited for")
    server.token = "the-new-token"
    with pytest.raises(pc.AuthenticationError):
        await run.astop()
    await server.crew().asave(name, overwrite=True)
    assert (await run.aresume("fine", approve=True)).status == "resumed"
    assert (await run.astop()).accepted


async def test_a_stop_needs_no_crew_database(server: CrewServer, monkeypatch: pytest.MonkeyPatch):
    run = await server.crew().atrigger({})
    away = AsyncMock(side_effect=StoreError("The disk is full.", operation="any", started="yes"))
    for module in ("stop", "run"):
        monkeypatch.setattr(f"prefect_crew.runs.{module}.in_store", away)
    assert (await run.astop()).accepted
    assert str(server.runs[0].state) == "stopped"


# The runs of a flow run


async def open_ids(flow_run_id: Any) -> set[str]:
    async with get_client() as client:
        open_ones = await stop.open_runs_of(client, await client.read_flow_run(uuid.UUID(str(flow_run_id))))
    return {str(attempt.first_id) for attempt in open_ones}


async def test_open_runs_are_those_of_the_flow_run_and_its_subflows(server: CrewServer):
    crew = server.crew()

    async def trip() -> list[str]:
        _, kickoff_id = await acall_in_flow(lambda: pc.kickoff_crew(crew))
        return [kickoff_id, await pc.kickoff_crew(crew)]

    await pc.kickoff_crew(crew)  # of somebody else
    flow_run_id, kickoff_ids = await acall_in_flow(trip)
    assert await open_ids(flow_run_id) == {*kickoff_ids}
    await pc.stop_crew(crew, kickoff_ids[0])
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
        assert deployed in [child["id"] for child in await asyncio.to_thread(seen.subflow_runs, own)]
        counts = {"kickoff_id": str(uuid.uuid4()), "flow_run_id": deployed}
        await aput(new_attempt(state=AttemptState.STARTED, counts_until=time.time() + 60, **counts))
        assert await open_ids(own) == set()
        assert len(await open_ids(deployed)) == 1
        await client.set_flow_run_state(uuid.UUID(own), Cancelling(), force=True)
    assert await stop.cancelled_on_server(own)
    assert not await stop.cancelled_on_server(deployed)
