"""The crew worker: what it runs, how it ends flow runs, and what becomes of them when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
import prefect.flow_engine
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateDetails, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound, ObjectNotFound
from prefect.states import AwaitingRetry, Cancelling, Completed, Paused, Pending, Running, Scheduled, Suspended

from prefect_crew._internal.flow_engine import HeldFlowRun, many_flow_runs
from prefect_crew.client._client import CrewClient
from prefect_crew.pool import HANDED_OVER, hand_over, read_workers, stop_crews_of
from prefect_crew.records import prune
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.worker import CANCELLED_AT_ONCE, CrewJobConfiguration, CrewWorker, CrewWorkerResult, _clock
from support.crew_pool import EXITS, IMPORTABLE, USER_FLOWS, CrewOnCommand, CrewPool
from support.deployed import command, wait_until
from support.prefect_server import PrefectServer, connected
from support.proxy import Proxy
from support.records import attempts, let_pass, put
from support.waiting import until
from support.workers import Worker

STATUS_CODE = "prefect.infrastructure.status-code"
QUICK = """
name: quick
inputs: [topic]
tasks: [{name: write, seconds: 0.3, output: "About {{ topic }}"}]
"""


@pytest.fixture(scope="module")
def pool(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrewPool]:
    with CrewPool(prefect_server, tmp_path_factory.mktemp("crew-pool")) as pool:
        pool.add_crew("quick", QUICK)
        yield pool


def record(**fields: Any) -> RunRecord:
    """Return the record of a run of the crew `quick`."""
    key = f"of a worker {uuid4()}"
    known: dict[str, Any] = {"crew": "quick", "crew_url": "https://quick.test", "inputs_digest": "", "owner": key}
    return RunRecord(idempotency_key=key, attempt=1, claimed_at=datetime.now(UTC), **known | fields)


@pytest.fixture
def connection(pool: CrewPool) -> Iterator[None]:
    """This process is a client of the pool's Prefect server."""
    with connected(pool.server, pool.folder / "home"):
        yield


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize("reason", [None, "stop was asked for: stopping"])
async def test_the_crew_of_a_flow_run_that_is_gone_is_asked_to_stop_once(pool: CrewPool, reason: str | None):
    crew = pool.crews["quick"]
    flow_run, asked = (
        FlowRun(id=uuid4(), flow_id=uuid4(), name="gone", start_time=datetime.now(UTC)),
        crew.requests["stop"],
    )
    async with CrewClient(crew.url, crew.token) as client:
        kickoff_id = await client.kickoff({"topic": "tea"})
    known = {"flow_run_id": str(flow_run.id), "kickoff_id": kickoff_id, "crew_url": crew.url}
    await put(record(phase=RecordPhase.STARTED, reason=reason, **known))
    async with get_client() as prefect:
        await stop_crews_of(prefect, flow_run)
    assert crew.requests["stop"] == asked + (reason is None)


@pytest.mark.usefixtures("connection")
async def test_a_crew_of_a_flow_run_that_is_gone_is_named_if_it_may_run_on(
    pool: CrewPool, caplog: pytest.LogCaptureFixture
):
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), name="gone", start_time=datetime.now(UTC))
    owned = {"flow_run_id": str(flow_run.id), "crew_url": pool.crews["quick"].url}
    await put(record(**owned))  # a claim alone has surely started nothing
    cut_off = await put(record(**owned), permit=0)
    lost = await put(record(phase=RecordPhase.STARTED, kickoff_id="lost", **owned | {"crew_url": "https://gone.test"}))
    caplog.set_level("WARNING", "prefect.flow_runs")
    async with get_client() as prefect:
        await stop_crews_of(prefect, flow_run)
    assert caplog.text.count(" is uncertain. ") == 1
    assert f"prefect-crew runs resolve '{cut_off.idempotency_key}' --kickoff-id ID, or --never-started" in caplog.text
    assert f"To stop the crew, run: prefect-crew runs cancel {lost.kickoff_id}" in caplog.text


@pytest.fixture(scope="module")
def worker(pool: CrewPool) -> Worker:
    return pool.worker("first", PREFECT_WORKER_PREFETCH_SECONDS="300")


@pytest.mark.usefixtures("worker")
def test_a_deployed_crew_runs_as_a_coroutine_of_the_worker_and_sends_no_heartbeat(pool: CrewPool):
    run_id = pool.start(pool.deploy("quick"), crew="quick", inputs={"topic": "tea"})
    run = pool.wait_for(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert run["infrastructure_pid"].startswith("first/")
    wait_until(lambda: "Crew quick was kicked off" in pool.logs(run_id), seconds=30, what="its log")

    def events() -> set[str]:
        wanted = {"resource": {"id": [f"prefect.flow-run.{run_id}"]}}
        found = pool.call("POST", "/events/filter", {"filter": wanted, "limit": 50})
        return {event["event"] for event in found["events"]}

    wait_until(lambda: "prefect.flow-run.Completed" in events(), seconds=60, what="its last event")
    assert "prefect.flow-run.heartbeat" not in events(), "no automation takes it for crashed"


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("entrypoint", "state", "message"),
    [
        (f"{USER_FLOWS}.exits", "Crashed", ""),
        (f"{USER_FLOWS}.exits_in_tasks", "Failed", "raised SystemExit"),
        (f"{USER_FLOWS}.fails_once", "Completed", ""),
        (f"{USER_FLOWS}.too_slow", "TimedOut", "exceeded timeout"),
        (f"{USER_FLOWS}.synchronous", "Failed", "is synchronous"),
        (f"{USER_FLOWS}.yields", "Failed", "is a generator"),
        ("myf.py:quick", "Failed", "is not an import path of a flow"),
        (f"{USER_FLOWS}.missing", "Failed", "cannot be imported"),
        (f"{EXITS}.anything", "Failed", "cannot be imported (SystemExit: 5)"),
        ("email.message_from_string", "Failed", "is not allowed to import email. Add it to PREFECT_INTEGRATIONS_CREW_"),
    ],
)
def test_a_flow_of_ones_own_ends_alone_and_what_is_none_is_refused(
    pool: CrewPool, entrypoint: str, state: str, message: str
):
    run = pool.wait_for(pool.start(pool.deploy("own", entrypoint)))
    assert run["state_name"] == state, run["state"]["message"]
    assert message in (run["state"]["message"] or "")


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("name", "code"), [("greet", "0"), ("exits", "1")])
def test_what_a_flow_run_ended_with_is_told_in_an_event_and_job_variables_without_effect_in_its_log(
    pool: CrewPool, name: str, code: str
):
    deployment = pool.deploy(f"told-{name}", f"{USER_FLOWS}.{name}", job_variables={"image": "mine", "env": {"A": "1"}})
    run_id = pool.start(deployment, **({"name": "Ada"} if name == "greet" else {}))
    pool.wait_for(run_id)
    wait_until(lambda: "The job variables env, image have no effect" in pool.logs(run_id), seconds=30, what="its log")

    def codes() -> list[str]:
        executed = {"name": ["prefect.worker.executed-flow-run"]}
        wanted = {"related": {"id": [f"prefect.flow-run.{run_id}"]}, "event": executed}
        events = pool.call("POST", "/events/filter", {"filter": wanted, "limit": 50})["events"]
        related = [resource for event in events for resource in event["related"]]
        return [one[STATUS_CODE] for one in related if STATUS_CODE in one]

    wait_until(lambda: codes() == [code], seconds=60, what="its event")
    assert pool.states(run_id)[-1] == ("Crashed" if code == "1" else "Completed")


@pytest.mark.usefixtures("worker")
def test_what_a_flow_logs_is_its_own(pool: CrewPool):
    deployment = pool.deploy("greet", f"{USER_FLOWS}.greet")
    runs = {name: pool.start(deployment, name=name) for name in ("Ada", "Eve", "Bob")}
    for name, run_id in runs.items():
        assert pool.wait_for(run_id)["state_name"] == "Completed"
        wait_until(lambda run=run_id, name=name: f"greeting {name}" in pool.logs(run), seconds=30, what="its log")
        assert [other for other in runs if f"greeting {other}" in pool.logs(run_id)] == [name]


def test_a_flow_that_blocks_the_loop_is_named(pool: CrewPool, worker: Worker):
    run = pool.wait_for(pool.start(pool.deploy("blocks", f"{USER_FLOWS}.blocks"), seconds=9))
    assert run["state_name"] == "Completed"
    warning = worker.process.wait_for("has blocked the event loop", 30)
    assert f"Flow run '{run['name']}'" in warning
    assert "crew_worker_flows.py:" in "".join(warning.split())


@pytest.mark.usefixtures("worker")
def test_results_are_persisted_where_the_flow_says_so(pool: CrewPool):
    data, given = {}, {"persists": dict[str, Any](), "sleeps": {"seconds": 0.1}}
    for name, parameters in given.items():
        run = pool.wait_for(pool.start(pool.deploy(name, f"{USER_FLOWS}.{name}"), **parameters))
        assert run["state_name"] == "Completed"
        data[name] = run["state"]["data"]
    assert (pool.folder / "home" / "storage" / data["persists"]["storage_key"]).exists()
    assert "storage_key" not in (data["sleeps"] or {})


@pytest.mark.usefixtures("worker")
def test_a_flow_run_that_is_cancelled_before_it_begins_ends_as_cancelled(pool: CrewPool):
    deployment = pool.deploy("early", f"{USER_FLOWS}.sleeps")
    soon, later = datetime.now(UTC) + timedelta(minutes=4), datetime.now(UTC) + timedelta(hours=2)
    taken = pool.start(deployment, at=soon, seconds=1)  # workers of this pool take flow runs 5 minutes early
    pool.wait_for(taken, "PENDING")
    handed_over = pool.start(deployment, at=later, seconds=1)
    pool.change(handed_over, infrastructure_pid=HANDED_OVER)
    scheduled = pool.start(deployment, at=later, seconds=1)
    for run_id in (taken, handed_over, scheduled):
        pool.set_state(run_id, "CANCELLING")
    for run_id in (taken, handed_over, scheduled):
        assert pool.wait_for(run_id)["state_name"] == "Cancelled"


@pytest.mark.parametrize(
    ("state", "owner", "left"),
    [
        (Running(), "gone/1", True),
        (Running(), "alive/1", False),
        (Running(), "one/an earlier start", True),
        (Running(), HANDED_OVER, True),  # its worker died between two requests
        (Running(), None, False),  # run by hand
        (Pending(), None, True),
        (Pending(), HANDED_OVER, True),
        (Cancelling(), HANDED_OVER, True),
        (Cancelling(), "alive/1", False),
        (Paused(), "gone/1", True),
        (Paused(reschedule=True), "gone/1", False),  # suspended
        (AwaitingRetry(), HANDED_OVER, False),
    ],
)
def test_who_has_a_flow_run(state: State, owner: str | None, left: bool):
    worker = CrewWorker("a pool", name="one")
    worker._workers = {"alive": True, "one": True, "gone": False}
    flow_run = FlowRun(flow_id=uuid4(), state=state, infrastructure_pid=owner)
    assert worker._is_left(flow_run) is left
    flow_run.infrastructure_pid = worker.identity
    assert worker._is_left(flow_run) is (not state.is_scheduled() and not state.state_details.pause_reschedule)


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize(("ending", "state"), [("handed over", "AwaitingRetry"), ("cancelled", "Cancelled")])
async def test_a_flow_run_may_be_ended_before_its_flow_has_begun(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, ending: Any, state: str
):
    deployment = await asyncio.to_thread(pool.deploy, "ended", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=60))
    await asyncio.to_thread(pool.set_state, run_id, "PENDING")
    execute = CrewWorker._execute

    def execute_ended(self: CrewWorker, held: Any, configuration: CrewJobConfiguration) -> Any:
        asyncio.get_running_loop().call_soon(
            held.end, ending, "In good time."
        )  # comes before the coroutine's first step
        return execute(self, held, configuration)

    monkeypatch.setattr(CrewWorker, "_execute", execute_ended)
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    async with CrewWorker(pool.name, name="in process") as worker:
        flow_run = await worker.client.read_flow_run(UUID(run_id))
        configuration = await CrewJobConfiguration.resolve_for_flow_run(
            flow_run, client=worker.client, work_pool=worker.work_pool, worker_name=worker.name
        )
        await worker.run(flow_run, configuration)
        found = await worker.client.read_flow_run(flow_run.id)
    assert found.state is not None
    assert (found.state.name, found.state.message) == (state, "In good time.")


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize(
    ("is_online", "seconds", "state"), [(True, 60, "Cancelling"), (False, 1, "Cancelling"), (False, 60, "Cancelled")]
)
async def test_a_flow_run_is_cancelled_for_another_worker_only_once_that_is_surely_gone(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, is_online: bool, seconds: float, state: str
):
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    deployment = await asyncio.to_thread(pool.deploy, "theirs", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = UUID(await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=1)))
    async with CrewWorker(pool.name, name="looks") as worker:
        owner = f"owner {uuid4()}"
        if is_online:  # since the last look at the workers
            await worker.client.send_worker_heartbeat(pool.name, owner, heartbeat_interval_seconds=30)
        await worker.client.update_flow_run(run_id, infrastructure_pid=f"{owner}/1")
        for begun in (Running(), Cancelling()):
            await worker.client.set_flow_run_state(run_id, begun, force=True)
        worker._cancelling_since[run_id] = _clock() - seconds
        for _ in range(CANCELLED_AT_ONCE):  # the worker's own flow runs, whose crews' servers hang
            await worker._ending_cancelled.acquire()
        async with asyncio.timeout(20):
            await worker._cancel(await worker.client.read_flow_run(run_id))
        assert (await worker.client.read_flow_run(run_id)).state_name == state


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize(
    ("owner", "flow_state"),
    [
        ("{worker.identity}", "CANCELLED"),
        ("{worker.name}/an earlier start", "CANCELLED"),
        ("gone/1", "CANCELLED"),
        ("gone/1", "SCHEDULED"),
        ("is no pid", "CANCELLED"),
        ("alive/1", "CANCELLED"),
    ],
)
async def test_infrastructure_that_is_to_be_killed_is_not_found_unless_a_worker_that_is_online_has_it(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, owner: str, flow_state: str
):
    """As Prefect's own workers answer: those of Docker and Kubernetes for what has ended, or was never there."""
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    crew = pool.crews["quick"]
    asked = crew.requests["stop"]
    deployment = await asyncio.to_thread(pool.deploy, "killed", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = UUID(await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=1)))
    async with CrewClient(crew.url, crew.token) as client:
        kickoff_id = await client.kickoff({"topic": "tea"})
    started = {"flow_run_id": str(run_id), "kickoff_id": kickoff_id, "crew_url": crew.url}
    await put(record(phase=RecordPhase.STARTED, **started))
    async with CrewWorker(pool.name, name="kills") as worker:
        await worker.client.send_worker_heartbeat(pool.name, "alive", heartbeat_interval_seconds=30)
        await worker.client.set_flow_run_state(run_id, Running(), force=True)
        flow_run = await worker.client.read_flow_run(run_id)
        configuration = await CrewJobConfiguration.resolve_for_flow_run(
            flow_run, client=worker.client, work_pool=worker.work_pool, worker_name=worker.name
        )
        # The server has ended it as Cancelled by itself; then somebody may have begun it again.
        await worker.client.set_flow_run_state(run_id, State(type=StateType(flow_state)), force=True)
        expected = InfrastructureNotAvailable if owner == "alive/1" else InfrastructureNotFound
        with pytest.raises(expected):
            await worker.kill_infrastructure(owner.format(worker=worker), configuration)
    is_stopped = flow_state == "CANCELLED" and owner != "alive/1"
    assert crew.requests["stop"] - asked == is_stopped


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize("is_begun_since", [False, True], ids=["held before", "begun since"])
async def test_a_flow_run_counts_as_lost_only_if_it_was_held_before_the_pool_was_read(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, is_begun_since: bool
):
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    flow_run = FlowRun(flow_id=uuid4(), name="begins", state=Running(), infrastructure_pid="another/1")
    async with CrewWorker(pool.name, name="reads") as worker:
        held = HeldFlowRun(flow_run, AsyncMock())

        async def read(*_: Any) -> list[FlowRun]:
            worker._held[flow_run.id] = held
            return [flow_run]

        monkeypatch.setattr("prefect_crew.worker.read_flow_runs", read)
        if not is_begun_since:
            worker._held[flow_run.id] = held
        await worker._take_over_all()
        del worker._held[flow_run.id]
    assert held.ending == (None if is_begun_since else "lost")


@pytest.mark.usefixtures("connection")
async def test_a_worker_that_goes_on_under_another_name_is_online_under_that_one(pool: CrewPool):
    async with CrewWorker(pool.name, name="twin", heartbeat_interval_seconds=1) as worker:
        lost = FlowRun(id=uuid4(), flow_id=uuid4(), infrastructure_pid="twin/another")
        worker._held[lost.id] = HeldFlowRun(lost, AsyncMock())
        worker._end_if_lost(lost)
        del worker._held[lost.id]
        async with asyncio.timeout(30):  # after three heartbeats that nobody sends it counts as gone
            while (await read_workers(worker.client, pool.name)).get("twin"):
                await asyncio.sleep(0.5)
        assert (await read_workers(worker.client, pool.name))[f"twin-{worker.boot}"]


async def test_a_worker_whose_key_may_not_change_its_pool_starts_without_a_description_of_it(proxy: Proxy):
    async with get_client() as prefect:
        pool = await prefect.create_work_pool(WorkPoolCreate(name=f"bare {uuid4()}", type="crew"))
    proxy.refuse = f"PATCH /api/work_pools/{quote(pool.name)}"
    async with CrewWorker(pool.name, name="keyed") as worker:
        await worker.sync_with_backend()
        assert proxy.count(proxy.refuse), "it has tried"
        assert (await read_workers(worker.client, pool.name))["keyed"]


@pytest.mark.usefixtures("connection")
async def test_what_the_worker_was_about_to_begin_is_taken_later_where_the_server_is_away(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    deployment = await asyncio.to_thread(pool.deploy, "away", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = UUID(await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=1)))
    async with CrewWorker(pool.name, name="goes on", limit=1) as worker:
        monkeypatch.setattr(worker.client, "read_deployment", AsyncMock(side_effect=httpx.ConnectError("refused")))
        for begun in (Pending(), Running()):  # its place is free again; the second time the worker has taken it over
            await worker.client.set_flow_run_state(run_id, begun, force=True)
            flow_run = await worker.client.read_flow_run(run_id)
            if begun.is_pending():
                flow_run.state = Scheduled()
                monkeypatch.setattr(worker, "_propose_pending_state", AsyncMock(return_value=True))
            assert await worker._submit_scheduled_flow_runs([WorkerFlowRunResponse.model_construct(flow_run=flow_run)])
            await until(lambda: not (worker._submitting_flow_run_ids or worker.limiter.borrowed_tokens))
            assert (await worker.client.read_flow_run(run_id)).state_name == begun.name


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize(
    ("begun", "options", "expected"),
    [
        (Running(), {}, "begins"),
        (Running(), {"limit": 1}, "AwaitingRetry"),
        (Running(), {"work_queues": ["another"]}, "AwaitingRetry"),
        (Running(state_details=StateDetails(deployment_concurrency_lease_id=uuid4())), {}, "AwaitingRetry"),
        (Paused(), {}, "AwaitingRetry"),
        (Cancelling(), {}, "Cancelling"),
    ],
    ids=["alone", "worker's limit", "work queue", "deployment's limit", "paused", "changed since"],
)
async def test_a_flow_run_that_was_left_behind_begins_at_once_unless_only_the_pool_knows_whether_it_may(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, begun: State, options: dict[str, Any], expected: str
):
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    run = AsyncMock(return_value=CrewWorkerResult(identifier="", status_code=0))
    monkeypatch.setattr(CrewWorker, "run", run)
    deployment = await asyncio.to_thread(pool.deploy, "left", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = UUID(await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=1)))
    async with CrewWorker(pool.name, name="heir", **options) as worker:
        await worker.client.update_flow_run(run_id, infrastructure_pid="gone/1")
        seen = Running() if expected == "Cancelling" else begun
        await worker.client.set_flow_run_state(run_id, seen, force=True)
        flow_run = await worker.client.read_flow_run(run_id)
        if expected == "Cancelling":
            await worker.client.set_flow_run_state(run_id, begun, force=True)
        if "limit" in options:
            worker.limiter.acquire_on_behalf_of_nowait("another flow run")
        await worker._take_over_page([flow_run])
        await until(lambda: not worker._submitting_flow_run_ids)
        current = await worker.client.read_flow_run(run_id)
    assert run.await_count == (expected == "begins")
    assert current.state_name == ("Running" if expected == "begins" else expected)
    assert current.infrastructure_pid == (HANDED_OVER if expected == "AwaitingRetry" else worker.identity)


@pytest.fixture
def heir(pool: CrewPool, connection: None, monkeypatch: pytest.MonkeyPatch) -> CrewWorker:
    """A worker, to be entered, that runs no flow and looks at nothing by itself."""
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    monkeypatch.setattr(CrewWorker, "run", AsyncMock(return_value=CrewWorkerResult(identifier="", status_code=0)))
    return CrewWorker(pool.name, name="heir")


async def left_behind(pool: CrewPool, worker: CrewWorker) -> FlowRun:
    """Return a flow run that is Running on a worker that is gone."""
    deployment = await asyncio.to_thread(pool.deploy, "left", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = UUID(await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=1)))
    await worker.client.update_flow_run(run_id, infrastructure_pid="gone/1")
    await worker.client.set_flow_run_state(run_id, Running(), force=True)
    return await worker.client.read_flow_run(run_id)


@pytest.mark.parametrize("problem", ["deleted", "no answer"])
async def test_a_problem_with_one_flow_run_keeps_no_other_from_being_taken_over(
    pool: CrewPool, heir: CrewWorker, monkeypatch: pytest.MonkeyPatch, problem: str
):
    async with heir:
        bad, good = [await left_behind(pool, heir) for _ in range(2)]
        create = heir.client.create_flow_run_input

        async def create_but_for_one(flow_run_id: UUID, *arguments: Any) -> None:
            if flow_run_id == bad.id and problem == "no answer":
                raise httpx.ReadTimeout("no answer")
            await create(flow_run_id, *arguments)

        monkeypatch.setattr(heir.client, "create_flow_run_input", create_but_for_one)
        if problem == "deleted":
            await heir.client.delete_flow_run(bad.id)
        problems = await heir._take_over_page([bad, good])
        current = await heir.client.read_flow_run(good.id)
    assert len(problems) == (problem == "no answer")
    assert current.infrastructure_pid == heir.identity


async def test_a_worker_that_could_not_read_its_pool_does_before_it_takes_over(
    pool: CrewPool, heir: CrewWorker, monkeypatch: pytest.MonkeyPatch
):
    away = AsyncMock(side_effect=httpx.ConnectError("refused"))
    with monkeypatch.context() as patched:
        patched.setattr(heir, "sync_with_backend", away)
        async with heir:
            assert heir._work_pool is None
            patched.undo()
            await heir._take_over_all()
            assert heir.work_pool.name == pool.name


async def test_a_block_that_is_missing_does_not_count_as_a_deleted_deployment(
    pool: CrewPool, heir: CrewWorker, monkeypatch: pytest.MonkeyPatch
):
    missing = AsyncMock(side_effect=ObjectNotFound(Exception("a block of the pool's template")))
    monkeypatch.setattr(CrewJobConfiguration, "resolve_for_flow_run", missing)
    async with heir:
        flow_run = await left_behind(pool, heir)
        await heir._submit_run(flow_run)
        current = await heir.client.read_flow_run(flow_run.id)
    assert current.state_name == "Crashed"


async def test_no_end_is_written_for_a_flow_run_that_another_worker_has_taken(pool: CrewPool, heir: CrewWorker):
    async with heir:
        flow_run = await left_behind(pool, heir)
        held = heir._held[flow_run.id] = HeldFlowRun(flow_run, heir._confirm)
        with contextlib.suppress(asyncio.CancelledError):
            await heir._confirm(held, Completed())
        heir._held.clear()
    assert held.ending == "lost"


@pytest.mark.usefixtures("connection")
async def test_a_worker_removes_records_of_long_ago(pool: CrewPool, monkeypatch: pytest.MonkeyPatch):
    records = [await put(record(phase=RecordPhase.ENDED, kickoff_id="k")) for _ in range(2)]
    old, young = (one.idempotency_key for one in records)
    let_pass(monkeypatch, old, 31)
    monkeypatch.setattr(prune, "FIRST_WITHIN", 0.2)
    async with CrewWorker(pool.name, name="prunes"):
        async with asyncio.timeout(30):
            while await attempts(old):
                await asyncio.sleep(0.1)
    assert await attempts(young)


@pytest.mark.usefixtures("connection")
async def test_what_has_ended_is_not_handed_over(pool: CrewPool):
    deployment = await asyncio.to_thread(pool.deploy, "ended", f"{USER_FLOWS}.sleeps")
    run_id = await asyncio.to_thread(partial(pool.start, deployment, at=datetime.now(UTC) + timedelta(hours=1)))
    async with get_client() as client:
        seen = (await client.read_flow_run(UUID(run_id))).state_id
        await client.set_flow_run_state(UUID(run_id), Running(), force=True)
        assert not await hand_over(client, UUID(run_id), "Its worker is gone.", only_from=seen)
        await client.set_flow_run_state(UUID(run_id), Completed())
        assert not await hand_over(client, UUID(run_id), "Its worker is gone.")
        assert (await client.read_flow_run(UUID(run_id))).state_name == "Completed"


@pytest.mark.usefixtures("prefect_api")
async def test_a_slot_of_a_deployments_limit_that_is_gone_ends_no_flow_run(caplog: pytest.LogCaptureFixture):
    @flow
    async def limited() -> list[str]:
        lease: Any = prefect.flow_engine.amaintain_concurrency_lease  # pyright: ignore[reportPrivateImportUsage]
        async with lease(uuid4(), 0.1, raise_on_lease_renewal_failure=True):
            await until(lambda: "lost its slot in the deployment's concurrency limit" in caplog.text)
            return [thread.name for thread in threading.enumerate()]

    with many_flow_runs(print):
        threads = await limited()
    assert not [name for name in threads if "lease" in name]


class Handed:
    """A pool of its own with a crew that ends on command, and flow runs of it."""

    def __init__(self, pool: CrewPool) -> None:
        self.pool = pool
        self.program = CrewOnCommand()
        self.crew = pool.add_crew("on-command", self.program)
        self.deployment = pool.deploy("on-command")

    def start(self, count: int) -> list[str]:
        """Start flow runs, and return their ids once the crew runs for all of them."""
        before = self.crew.kickoffs
        runs = [
            self.pool.start(self.deployment, crew="on-command", inputs={"topic": f"topic {before + number}"})
            for number in range(count)
        ]
        wait_until(lambda: self.crew.kickoffs == before + count, seconds=90, what=f"{count} kickoffs")
        asked = self.crew.requests["status"]
        wait_until(lambda: self.crew.requests["status"] >= asked + count, seconds=60, what="waits")
        wait_until(lambda: all(map(self.owner, runs)), seconds=30, what="their owners")
        return runs

    def owner(self, run_id: str) -> str:
        """Return the name of the worker that has a flow run, "" for none."""
        return (self.pool.flow_run(run_id)["infrastructure_pid"] or "").rpartition("/")[0]

    def wait_for_owner(self, runs: list[str], name: str, seconds: float = 60.0) -> None:
        wait_until(lambda: {*map(self.owner, runs)} == {name}, seconds=seconds, what=f"flow runs of {name}")

    def names(self, runs: list[str]) -> set[str]:
        """Return the names of the states of flow runs."""
        return {self.pool.flow_run(run_id)["state_name"] for run_id in runs}

    def end(self, runs: list[str]) -> None:
        """End the crew's runs; fail unless every flow run completes and each was kicked off once."""
        self.program.ended = True
        assert {self.pool.wait_for(run_id)["state_name"] for run_id in runs} == {"Completed"}
        assert self.crew.kickoffs == len(self.crew.runs) == len(self.crew.kickoffs_by_key)


@pytest.fixture
def handed(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[Handed]:
    with CrewPool(prefect_server, tmp_path, heartbeat=3) as pool:
        yield Handed(pool)


@pytest.mark.parametrize("is_gone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["there", "gone"])
def test_cancelling_stops_the_crew_whether_its_worker_is(handed: Handed, is_gone: bool):
    one = handed.pool.worker("one")
    (run_id,) = handed.start(1)
    if is_gone:
        one.kill()
    handed.pool.set_state(run_id, "CANCELLING")
    if is_gone:
        handed.pool.worker("one")
    run = handed.pool.wait_for(run_id)
    assert run["state_name"] == "Cancelled", run["state"]["message"]
    assert [run.state for run in handed.crew.runs] == ["stopped"]
    assert handed.crew.requests["stop"] == 1


def test_cancelling_stops_a_crew_that_its_flow_run_does_not_wait_for_at_that_moment(handed: Handed):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("starts", f"{USER_FLOWS}.starts_and_sleeps"), seconds=300)
    wait_until(lambda: "was kicked off" in pool.logs(run_id), seconds=60, what="the kickoff")
    pool.set_state(run_id, "CANCELLING")
    run = pool.wait_for(run_id)
    assert run["state_name"] == "Cancelled", run["state"]["message"]
    assert ([run.state for run in crew.runs], crew.requests["stop"]) == (["stopped"], 1)


def test_a_hook_of_a_cancelled_flow_run_may_start_a_crew(handed: Handed):
    pool, quick = handed.pool, handed.pool.add_crew("quick", QUICK)
    pool.worker("one")
    run_id = pool.start(pool.deploy("cleans-up", f"{USER_FLOWS}.cleans_up"))
    wait_until(lambda: handed.crew.requests["status"] > 0, seconds=60, what="the wait")
    pool.set_state(run_id, "CANCELLING")
    assert pool.wait_for(run_id)["state_name"] == "Cancelled"
    assert [run.state for run in quick.runs] == ["completed"]


@pytest.mark.parametrize("how", ["task", "thread", "submitted task"])
def test_what_a_cancelled_flow_run_has_spawned_starts_no_further_crew(handed: Handed, how: str):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns"), how=how)
    wait_until(lambda: crew.requests["status"] > 0, seconds=60, what="the first wait")
    pool.set_state(run_id, "CANCELLING")
    assert pool.wait_for(run_id)["state_name"] == "Cancelled"

    def has_gone_on() -> bool:
        return crew.kickoffs > 1 or pool.logs(run_id).count("FlowRunCancelledError") >= 2

    wait_until(has_gone_on, seconds=30, what="its next two starts")
    assert ([run.state for run in crew.runs], crew.requests["stop"]) == (["stopped"], 1)


@pytest.mark.parametrize("how", ["task", "thread", "submitted task"])
def test_what_a_suspended_flow_run_has_spawned_leaves_the_crews_to_its_resumption(handed: Handed, how: str):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns"), how=how)
    wait_until(lambda: crew.requests["status"] > 0, seconds=60, what="the first wait")
    suspend(pool, run_id)
    pool.call("POST", f"/flow_runs/{run_id}/resume", {})
    wait_until(lambda: pool.logs(run_id).count("three crews") == 2, seconds=60, what="its resumption")
    asked = crew.requests["status"]
    wait_until(lambda: crew.requests["status"] > asked + 3, seconds=60, what="both waits")
    handed.program.ended = True
    run = pool.wait_for(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    wait_until(lambda: "starts no crew" in pool.logs(), seconds=30, what="a refused start")
    assert (crew.kickoffs, crew.requests["stop"]) == (3, 0)


def test_a_submitted_task_that_no_flow_waits_for_starts_all_its_crews(handed: Handed):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns"), how="task without a wait")
    assert pool.wait_for(run_id)["state_name"] == "Completed"
    handed.program.ended = True
    wait_until(lambda: [run.state for run in crew.runs] == ["completed"] * 3, seconds=30, what="three crews")


def test_a_thread_that_a_flow_run_left_at_its_timeout_starts_no_further_crew(handed: Handed):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns_in_time"), how="thread")
    assert pool.wait_for(run_id)["state_name"] == "TimedOut"
    handed.program.ended = True
    wait_until(lambda: "starts no crew" in pool.logs(), seconds=30, what="a refused start")
    assert (crew.kickoffs, crew.requests["stop"]) == (1, 0)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_retry_begins_after_the_tasks_that_the_attempt_before_has_submitted(pool: CrewPool, is_cancelled: bool):
    pool.worker("one")
    flow = f"{USER_FLOWS}.retries_beside_a_task"
    run_id = pool.start(pool.deploy("retries", flow), seconds=60 if is_cancelled else 3)
    wait_until(lambda: "the first attempt fails" in pool.logs(run_id), seconds=60, what="the first attempt")
    if is_cancelled:
        pool.set_state(run_id, "CANCELLING")
    run = pool.wait_for(run_id, seconds=30)
    assert run["state_name"] == ("Cancelled" if is_cancelled else "Completed"), run["state"]["message"]
    if not is_cancelled:
        wait_until(lambda: "attempt 2 begins" in pool.logs(run_id), seconds=30, what="its logs")
        assert pool.logs(run_id).index("the task of attempt 1 ends") < pool.logs(run_id).index("attempt 2 begins")


def suspend(pool: CrewPool, run_id: str) -> None:
    state = {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True}}
    pool.call("POST", f"/flow_runs/{run_id}/set_state", {"state": state})
    wait_until(lambda: "ended on this worker" in pool.logs(run_id), seconds=30, what="its coroutine has ended")


def test_a_flow_run_that_is_suspended_from_outside_ends_its_coroutine_and_continues_when_it_is_resumed(handed: Handed):
    pool, crew = handed.pool, handed.crew
    quick = pool.add_crew("quick", QUICK)
    pool.worker("one")
    run_id = pool.start(pool.deploy("steps", f"{USER_FLOWS}.four_steps"))
    wait_until(lambda: crew.requests["status"] > 0, seconds=60, what="the third step")
    suspend(pool, run_id)
    handed.program.ended = True
    wait_until(lambda: crew.runs[0].state == "completed", seconds=30, what="the crew has gone on")
    assert pool.flow_run(run_id)["state_name"] == "Suspended"
    assert "step four begins" not in pool.logs(run_id)
    pool.call("POST", f"/flow_runs/{run_id}/resume", {})
    run = pool.wait_for(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert pool.states(run_id)[-4:] == ["Resuming", "Pending", "Running", "Completed"]
    wait_until(lambda: "step four begins" in pool.logs(run_id), seconds=30, what="its last step")
    assert pool.logs(run_id).count("step one begins") == 1
    assert (quick.kickoffs, crew.kickoffs, crew.requests["stop"]) == (1, 1, 0)


@pytest.mark.usefixtures("connection")
async def test_a_flow_that_ends_right_after_it_was_suspended_stays_suspended(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch
):
    deployment = await asyncio.to_thread(pool.deploy, "suspended", f"{USER_FLOWS}.sleeps")
    later = datetime.now(UTC) + timedelta(hours=1)
    run_id = await asyncio.to_thread(partial(pool.start, deployment, at=later, seconds=3))
    monkeypatch.setattr(CrewWorker, "_watch_pool", AsyncMock())
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WORKER_MODULES", USER_FLOWS)
    monkeypatch.syspath_prepend(IMPORTABLE)
    async with CrewWorker(pool.name, name="ends") as worker:
        await worker.client.set_flow_run_state(UUID(run_id), Running(), force=True)
        flow_run = await worker.client.read_flow_run(UUID(run_id))
        configuration = await CrewJobConfiguration.resolve_for_flow_run(
            flow_run, client=worker.client, work_pool=worker.work_pool, worker_name=worker.name
        )
        running = asyncio.create_task(worker.run(flow_run, configuration))
        await until(lambda: pool.states(run_id).count("Running") >= 2)
        await worker.client.set_flow_run_state(flow_run.id, Suspended())
        await running
        assert (await worker.client.read_flow_run(flow_run.id)).state_name == "Suspended"
        assert not await hand_over(worker.client, flow_run.id, "Its worker shuts down.")


@pytest.mark.slow
@pytest.mark.parametrize(("times", "code"), [(1, 0), (10**6, 1)])
def test_a_flow_that_swallows_cancellations_keeps_no_worker_from_its_end(handed: Handed, times: int, code: int):
    pool, one = handed.pool, handed.pool.worker("one")
    deployment = pool.deploy("swallows", f"{USER_FLOWS}.swallows")
    cancelled, kept = (pool.start(deployment, times=number) for number in (1, times))
    for run_id in (cancelled, kept):
        pool.wait_for(run_id, "RUNNING")
    pool.set_state(cancelled, "CANCELLING")
    assert pool.wait_for(cancelled, seconds=30)["state_name"] == "Cancelled"
    one.process.send(signal.SIGTERM)
    assert one.process.wait(45) == code
    assert pool.flow_run(kept)["state_name"] == ("Running" if code else "AwaitingRetry")


@pytest.mark.slow
@pytest.mark.parametrize("heir", ["one", "two"])
def test_a_crew_is_stopped_whose_flow_run_the_prefect_server_itself_has_ended_as_cancelled(
    tmp_path: Path, prefect_template: Path | None, heir: str
):
    timeout = {"PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "20"}
    with (
        PrefectServer(tmp_path, template=prefect_template, env=timeout) as server,
        CrewPool(server, tmp_path, heartbeat=3) as pool,
    ):
        handed = Handed(pool)
        one = pool.worker("one")
        (run_id,) = handed.start(1)
        one.kill()
        pool.set_state(run_id, "CANCELLING")
        run = pool.wait_for(run_id, seconds=60)
        assert "cancellation timed out" in run["state"]["message"], "the server has ended it"
        assert [run.state for run in handed.crew.runs] == ["running"]
        pool.worker(heir)
        wait_until(lambda: handed.crew.runs[0].state == "stopped", seconds=60, what="the crew is stopped")
        assert handed.crew.requests["stop"] == 1
        assert pool.states(run_id).count("Cancelled") == 1
        assert "dead-letter" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("heir", "end"), [("one", "SIGKILL"), ("two", "SIGKILL"), ("two", "SIGTERM")])
def test_a_worker_that_ends_leaves_crews_running_and_flow_runs_to_the_next_one(handed: Handed, heir: str, end: str):
    one = handed.pool.worker("one")
    runs = handed.start(3)
    if end == "SIGTERM":
        one.process.send(signal.SIGTERM)
        assert one.process.wait(40) == 0
    else:
        one.kill()
    assert handed.names(runs) == {"AwaitingRetry" if end == "SIGTERM" else "Running"}
    handed.pool.worker(heir)
    if heir == "one":
        dead = {handed.pool.flow_run(run_id)["infrastructure_pid"] for run_id in runs}
        wait_until(
            lambda: dead.isdisjoint(handed.pool.flow_run(run_id)["infrastructure_pid"] for run_id in runs),
            seconds=60,
            what="another owner",
        )
    handed.wait_for_owner(runs, heir, seconds=120)
    assert handed.crew.requests["stop"] == 0
    handed.end(runs)
    for run_id in runs:
        assert handed.pool.states(run_id).count("Running") == 2, "taken over once"


@pytest.mark.slow
def test_a_worker_that_was_frozen_gives_up_what_it_has_lost(handed: Handed):
    one = handed.pool.worker("one")
    runs = handed.start(3)
    one.process.send(signal.SIGSTOP)
    two = handed.pool.worker("two")
    handed.wait_for_owner(runs, "two", seconds=120)
    one.process.send(signal.SIGCONT)
    wait_until(lambda: "was taken by another worker" in one.log.read_text(), seconds=60, what="it notices")
    assert {*map(handed.owner, runs)} == {"two"}
    handed.end(runs)
    assert two.process.running
    for run_id in runs:
        assert handed.pool.states(run_id)[-1] == "Completed"


@pytest.mark.slow
def test_two_workers_that_are_given_one_name_go_on_as_two(handed: Handed):
    workers = [handed.pool.worker("one")]
    runs = handed.start(3)
    workers.append(handed.pool.worker("one"))

    def owners() -> set[str]:
        return {handed.pool.flow_run(run_id)["infrastructure_pid"] for run_id in runs}

    wait_until(lambda: "Another worker 'one' runs" in workers[0].log.read_text(), seconds=150, what="one notices")
    runs += handed.start(3)

    def are_kept() -> bool:
        before = owners()
        time.sleep(4 * handed.pool.heartbeat)
        return owners() == before

    assert are_kept(), "nobody takes a flow run from one that lives"
    workers_of_pool = handed.pool.call("POST", f"/work_pools/{handed.pool.name}/workers/filter", {})
    assert [worker["status"] for worker in workers_of_pool] == ["ONLINE", "ONLINE"]
    handed.end(runs)
    assert all(worker.process.running for worker in workers)
    for run_id in runs:
        assert handed.pool.states(run_id).count("Running") <= 2, "lost once at most"


@pytest.mark.slow
def test_a_batch_with_a_ledger_in_a_file_is_refused_where_several_workers_could_take_it_over(handed: Handed):
    pool = handed.pool
    pool.add_crew("quick", QUICK)
    rows = pool.folder / "rows.jsonl"
    rows.write_text('{"topic": "tea"}\n')
    own = pool.deploy("batch", "prefect_crew.operations.batch_file")
    within = pool.deploy("batch-within", f"{USER_FLOWS}.batch_in_a_subflow")

    def run(name: str, deployment: str = own) -> dict[str, Any]:
        given = {"crew": "quick", "dataset": str(rows), "name": name, "export": str(pool.folder / f"{name}.jsonl")}
        return pool.wait_for(pool.start(deployment, **given), seconds=120)

    pool.worker("one")
    assert run("alone")["state_name"] == "Completed"
    pool.worker("two")
    for refused in (run("next to another worker"), run("within another flow", within)):
        assert refused["state_name"] == "Failed"
        assert "has its ledger in a file of this machine" in refused["state"]["message"]
    # One that goes on has found its ledger.
    assert run("alone")["state_name"] == "Completed"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["worker", "work queue", "deployment"])
def test_a_limit_holds_and_its_slot_is_free_after_handing_over_and_taking_over(
    prefect_server: PrefectServer, tmp_path: Path, what: str
):
    with CrewPool(prefect_server, tmp_path, heartbeat=3) as pool:
        program = CrewOnCommand()
        crew = pool.add_crew("on-command", program)
        limit: dict[str, Any] = {"concurrency_limit": 1} if what == "deployment" else {}
        deployment = pool.deploy("on-command", **limit)
        if what == "work queue":
            command("prefect", "work-queue", "set-concurrency-limit", "default", "1", "--pool", pool.name, env=pool.env)
        started = partial(pool.worker, "one", limit=1 if what == "worker" else None)
        one = started()
        runs = [pool.start(deployment, crew="on-command", inputs={"topic": f"topic {number}"}) for number in range(3)]
        for end in (signal.SIGTERM, signal.SIGKILL, None):
            wait_until(lambda: crew.kickoffs >= 1, seconds=60, what="a kickoff")
            asked = crew.requests["status"]
            wait_until(lambda asked=asked: crew.requests["status"] > asked + 6, seconds=90, what="looks at the crew")
            running = [run_id for run_id in runs if pool.flow_run(run_id)["state_type"] == "RUNNING"]
            assert len(running) == 1
            if end is not None:
                one.process.send(end)
                one.process.wait(60)
                one = started()
        program.ended = True
        for run_id in runs:
            assert pool.wait_for(run_id, seconds=150)["state_name"] == "Completed"
        assert crew.kickoffs == 3
