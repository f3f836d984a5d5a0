"""The crew worker: what it runs, how it ends flow runs, and what becomes of them when it dies."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.exceptions import InfrastructureNotFound
from prefect.states import AwaitingRetry, Cancelling, Completed, Paused, Pending, Running, Suspended
from prefect.workers.base import BaseWorker

from prefect_crew._internal.prefect_api import HeldFlowRun
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.database import forget_stores, in_store
from prefect_crew.store import workers
from prefect_crew.store.decision import AttemptState
from prefect_crew.worker import CrewJobConfiguration, CrewWorker, CrewWorkerResult, stop_crews_of
from support.crew_pool import EXITS, IMPORTABLE, USER_FLOWS, CrewOnCommand, CrewPool
from support.deployed import command, wait_until
from support.past import aput, new_attempt
from support.prefect_server import PrefectServer, connected
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


@pytest.fixture
def crew_database(pool: CrewPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The crew database of the pool's workers."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_DATABASE_URL", pool.database_url)
    yield
    forget_stores()


@pytest.fixture
def connection(pool: CrewPool) -> Iterator[None]:
    """This process is a client of the pool's Prefect server."""
    with connected(pool.server, pool.folder / "home"):
        yield


@pytest.fixture
def unwatched(connection: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of this process looks at its pool only when the test says so (`look`)."""
    monkeypatch.setattr(CrewWorker, "_look", AsyncMock())
    monkeypatch.setattr(CrewWorker, "_give_all_back", AsyncMock())


@pytest.fixture
def ran(unwatched: None, monkeypatch: pytest.MonkeyPatch) -> AsyncMock:
    """A worker of this process runs no flow, and calls this."""
    ran = AsyncMock(return_value=CrewWorkerResult(identifier="", status_code=0))
    monkeypatch.setattr(CrewWorker, "run", ran)
    return ran


look_once, give_all_back_once = CrewWorker._look, CrewWorker._give_all_back


async def look(worker: CrewWorker) -> None:
    """Look once at the pool, and wait until the flow runs have gone back that nobody runs."""
    await look_once(worker)
    await give_all_back_once(worker)


def plan(pool: CrewPool, seconds: float = 1) -> UUID:
    """Return a flow run that no worker takes before the test has ended."""
    later = datetime.now(UTC) + timedelta(hours=1)
    return UUID(pool.start(pool.deploy("planned", f"{USER_FLOWS}.sleeps"), at=later, seconds=seconds))


async def resolve(worker: CrewWorker, run_id: UUID) -> tuple[FlowRun, CrewJobConfiguration]:
    """Return a flow run and its configuration, as the worker reads them before it runs it."""
    flow_run = await worker.client.read_flow_run(run_id)
    context: Any = {"client": worker.client, "work_pool": worker.work_pool, "worker_name": worker.name}
    return flow_run, await CrewJobConfiguration.resolve_for_flow_run(flow_run, **context)


async def kick_off(crew: CrewServer, run_id: UUID, **facts: Any) -> None:
    """Start a crew with the attempt that a flow run would leave of it."""
    async with CrewClient(crew.url, crew.token) as client:
        kickoff_id = await client.kickoff({"topic": "tea"})
    owned = {"crew": "quick", "crew_url": crew.url, "flow_run_id": str(run_id), **facts}
    await aput(new_attempt(state=AttemptState.STARTED, kickoff_id=kickoff_id, **owned))


@pytest.mark.usefixtures("connection")
async def test_a_gone_flow_runs_crews_are_stopped_or_named(pool: CrewPool, caplog: pytest.LogCaptureFixture):
    crew, run_id = pool.crews["quick"], uuid4()
    asked = crew.requests["stop"]
    await kick_off(crew, run_id)
    await kick_off(crew, run_id, stop_asked_at=1.0)
    owned = {"crew": "quick", "flow_run_id": str(run_id), "crew_url": crew.url}
    await aput(new_attempt(state=AttemptState.BACKING_OFF, **owned))  # it has surely started nothing
    cut_off = await aput(new_attempt(state=AttemptState.UNCERTAIN, **owned))
    unreachable = {**owned, "crew_url": "https://gone.test", "kickoff_id": "lost"}
    lost = await aput(new_attempt(state=AttemptState.STARTED, **unreachable))
    caplog.set_level("WARNING", "prefect.flow_runs")
    async with get_client() as prefect:
        gone = FlowRun(id=run_id, flow_id=uuid4(), name="gone", start_time=datetime.now(UTC))
        await stop_crews_of(prefect, gone)
    assert crew.requests["stop"] == asked + 1, "the other one was asked to stop before"
    assert caplog.text.count(" is uncertain. ") == 1
    assert f"prefect-crew runs resolve '{cut_off.key}' --kickoff-id ID, or --never-started" in caplog.text
    assert f"To stop the crew, run: prefect-crew runs cancel {lost.kickoff_id}" in caplog.text


@pytest.fixture(scope="module")
def worker(pool: CrewPool) -> Worker:
    return pool.worker("first", PREFECT_WORKER_PREFETCH_SECONDS="300")


def wait_for_log(pool: CrewPool, run_id: str, text: str) -> None:
    wait_until(lambda: text in pool.logs(run_id), f"{text!r} in its log")


def events(pool: CrewPool, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return pool.call("POST", "/events/filter", {"filter": wanted, "limit": 50})["events"]


@pytest.mark.usefixtures("worker")
def test_a_deployed_crew_is_a_coroutine_without_heartbeat(pool: CrewPool):
    run_id = pool.start(pool.deploy("quick"), crew="quick", inputs={"topic": "tea"})
    run = pool.wait_for(run_id)
    assert run["state_name"] == "Completed"
    assert run["infrastructure_pid"].startswith("first/")
    wait_for_log(pool, run_id, "Crew quick was kicked off")

    def names() -> set[str]:
        return {event["event"] for event in events(pool, {"resource": {"id": [f"prefect.flow-run.{run_id}"]}})}

    wait_until(lambda: "prefect.flow-run.Completed" in names(), what="its last event")
    assert "prefect.flow-run.heartbeat" not in names(), "no automation takes it for crashed"


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("entrypoint", "state", "message"),
    [
        (f"{USER_FLOWS}.exits", "Crashed", ""),
        (f"{USER_FLOWS}.exits_in_tasks", "Crashed", ""),
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
def test_a_users_flow_ends_or_is_refused(pool: CrewPool, entrypoint: str, state: str, message: str):
    run = pool.wait_for(pool.start(pool.deploy("own", entrypoint)))
    assert run["state_name"] == state
    assert message in (run["state"]["message"] or "")


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(("name", "code"), [("greet", "0"), ("exits", "1")])
def test_a_flow_runs_exit_code_is_in_an_event(pool: CrewPool, name: str, code: str):
    deployment = pool.deploy(f"told-{name}", f"{USER_FLOWS}.{name}", job_variables={"image": "mine", "env": {"A": "1"}})
    run_id = pool.start(deployment, **({"name": "Ada"} if name == "greet" else {}))
    pool.wait_for(run_id)
    wait_for_log(pool, run_id, "The job variables env, image have no effect")
    executed = {"name": ["prefect.worker.executed-flow-run"]}
    wanted = {"related": {"id": [f"prefect.flow-run.{run_id}"]}, "event": executed}

    def codes() -> list[str]:
        related = [resource for event in events(pool, wanted) for resource in event["related"]]
        return [one[STATUS_CODE] for one in related if STATUS_CODE in one]

    wait_until(lambda: codes() == [code], what="its event")
    assert pool.states(run_id)[-1] == ("Crashed" if code == "1" else "Completed")


@pytest.mark.usefixtures("worker")
def test_what_a_flow_logs_is_its_own(pool: CrewPool):
    deployment = pool.deploy("greet", f"{USER_FLOWS}.greet")
    runs = {name: pool.start(deployment, name=name) for name in ("Ada", "Eve", "Bob")}
    for name, run_id in runs.items():
        assert pool.wait_for(run_id)["state_name"] == "Completed"
        wait_for_log(pool, run_id, f"greeting {name}")
        assert [other for other in runs if f"greeting {other}" in pool.logs(run_id)] == [name]


def test_a_flow_that_blocks_the_loop_is_named(pool: CrewPool, worker: Worker):
    run = pool.wait_for(pool.start(pool.deploy("blocks", f"{USER_FLOWS}.blocks"), seconds=9))
    assert run["state_name"] == "Completed"
    warning = worker.process.wait_for("has blocked the event loop")
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
def test_a_flow_run_that_has_not_begun_is_cancelled(pool: CrewPool):
    deployment = pool.deploy("early", f"{USER_FLOWS}.sleeps")
    soon, later = datetime.now(UTC) + timedelta(minutes=4), datetime.now(UTC) + timedelta(hours=2)
    taken = pool.start(deployment, at=soon, seconds=1)  # workers of this pool take flow runs 5 minutes early
    pool.wait_for(taken, "PENDING")
    handed_over = pool.start(deployment, at=later, seconds=1)
    pool.call("PATCH", f"/flow_runs/{handed_over}", {"infrastructure_pid": "one/an earlier start"})
    scheduled = pool.start(deployment, at=later, seconds=1)
    for run_id in (taken, handed_over, scheduled):
        pool.set_state(run_id, "CANCELLING")
    for run_id in (taken, handed_over, scheduled):
        assert pool.wait_for(run_id)["state_name"] == "Cancelled"


SCHEDULED, RETRIED = State(type=StateType.SCHEDULED), AwaitingRetry()


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (Running(), "AwaitingRetry"),
        (Pending(), "AwaitingRetry"),
        (Paused(), "AwaitingRetry"),
        (Suspended(), "Suspended"),
        (SCHEDULED, "Scheduled"),
        (RETRIED, "AwaitingRetry"),
        (Cancelling(), "Cancelled"),
        (State(type=StateType.CANCELLED), "Cancelled"),
        (Completed(), "Completed"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.type.value,
)
async def test_a_flow_run_that_nobody_runs_goes_back(pool: CrewPool, state: State, expected: str):
    crew, run_id = pool.crews["quick"], plan(pool)
    asked = crew.requests["stop"]
    await kick_off(crew, run_id)
    async with CrewWorker(pool.name, name="heir") as worker:
        policy = FlowRunPolicy(retries=1, retry_type="in_process" if state is not SCHEDULED else None)
        await worker.client.update_flow_run(run_id, empirical_policy=policy)
        await worker.client.set_flow_run_state(run_id, state, force=True)
        await in_store(workers.hold, str(run_id), worker.boot)
        await look(worker)
        current = await worker.client.read_flow_run(run_id)
    assert current.state_name == expected
    assert await in_store(workers.holder, str(run_id)) != worker.boot
    assert crew.requests["stop"] - asked == (expected == "Cancelled")
    if expected in ("AwaitingRetry", "Suspended"):
        assert current.empirical_policy.retry_type == "reschedule", "else its pool does not hand it out"
    is_again = expected == "AwaitingRetry" and state is not RETRIED
    assert current.empirical_policy.retries == 1 + is_again, "a change of workers uses up no retry"


@pytest.mark.usefixtures("unwatched")
async def test_flow_runs_of_a_dead_worker_go_back_those_of_a_living_one_do_not(pool: CrewPool):
    runs = [plan(pool) for _ in range(2)]
    async with CrewWorker(pool.name, name="heir", heartbeat_interval_seconds=1) as worker:
        for run_id, name in zip(runs, ("gone", "alive"), strict=True):
            await worker.client.set_flow_run_state(run_id, Running(), force=True)
            await in_store(workers.beat, name, str(worker.work_pool.id), name, "elsewhere", 60)
            await in_store(workers.hold, str(run_id), name)
        await in_store(workers.retire, "gone")

        async def is_taken_away() -> bool:
            await worker._beat()
            await look(worker)
            return pool.states(str(runs[0]))[-1] != "Running"

        await until(is_taken_away, "the dead worker's flow run goes back")
        assert pool.states(str(runs[1]))[-1] == "Running"
        assert await in_store(workers.held_by, "alive") == [str(runs[1])]


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(("ending", "state"), [("handed over", "AwaitingRetry"), ("cancelled", "Cancelled")])
async def test_a_flow_run_ends_before_it_begins(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, ending: Any, state: str
):
    run_id, execute = plan(pool, seconds=60), CrewWorker._execute
    for begun in ("PENDING", "RUNNING", "CANCELLING")[: 3 if ending == "cancelled" else 1]:
        pool.set_state(str(run_id), begun)

    def execute_ended(self: CrewWorker, held: Any, configuration: CrewJobConfiguration) -> Any:
        held.end(ending, "In good time.")  # before the coroutine's first step
        return execute(self, held, configuration)

    monkeypatch.setattr(CrewWorker, "_execute", execute_ended)
    async with CrewWorker(pool.name, name="in process") as worker:
        await in_store(workers.hold, str(run_id), worker.boot)
        await worker.run(*await resolve(worker, run_id))
    # A worker of another test may have held the cancelled one before.
    await until(lambda: pool.flow_run(str(run_id))["state"]["name"] == state)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(("holder", "state"), [("another", "Cancelling"), (None, "Cancelled")])
async def test_a_worker_cancels_what_no_other_holds(pool: CrewPool, holder: str | None, state: str):
    run_id = plan(pool)
    async with CrewWorker(pool.name, name="looks") as worker:
        if holder is not None:
            await in_store(workers.beat, holder, str(worker.work_pool.id), holder, "elsewhere", 60)
            await in_store(workers.hold, str(run_id), holder)
        for begun in (Running(), Cancelling()):
            await worker.client.set_flow_run_state(run_id, begun, force=True)
        await look(worker)
        assert (await worker.client.read_flow_run(run_id)).state_name == state


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("flow_state", ["CANCELLED", "SCHEDULED"])
async def test_a_run_that_the_server_has_cancelled_stops_its_crews(pool: CrewPool, flow_state: str):
    """Prefect asks for it after a flow run was Cancelling for too long; then somebody may have begun it again."""
    crew, run_id = pool.crews["quick"], plan(pool)
    asked = crew.requests["stop"]
    await kick_off(crew, run_id)
    async with CrewWorker(pool.name, name="kills") as worker:
        await worker.client.set_flow_run_state(run_id, Running(), force=True)
        _, configuration = await resolve(worker, run_id)
        await worker.client.set_flow_run_state(run_id, State(type=StateType(flow_state)), force=True)
        with pytest.raises(InfrastructureNotFound):  # as Prefect's workers answer for what has ended
            await worker.kill_infrastructure("gone/1", configuration)
    assert crew.requests["stop"] - asked == (flow_state == "CANCELLED")


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("is_begun_since", [False, True], ids=["held before", "begun since"])
async def test_a_run_held_before_the_read_is_lost(
    pool: CrewPool, monkeypatch: pytest.MonkeyPatch, is_begun_since: bool
):
    flow_run = FlowRun(flow_id=uuid4(), name="begins", state=Running())
    async with CrewWorker(pool.name, name="reads") as worker:
        held = HeldFlowRun(flow_run, asyncio.get_running_loop())

        async def read(*_: Any) -> list[str]:
            worker._held[flow_run.id] = held
            return []

        monkeypatch.setattr("prefect_crew.worker.in_store", read)
        if not is_begun_since:
            worker._held[flow_run.id] = held
        await look(worker)
        del worker._held[flow_run.id]
    assert held.ending == (None if is_begun_since else "lost")


async def submit(worker: CrewWorker, run_id: UUID) -> None:
    """Let a worker begin a flow run that the pool hands out."""
    flow_run = await worker.client.read_flow_run(run_id)
    await worker._submit_scheduled_flow_runs([WorkerFlowRunResponse.model_construct(flow_run=flow_run)])
    await until(lambda: not (worker._submitting_flow_run_ids or worker._held))


@pytest.mark.usefixtures("unwatched")
async def test_a_start_that_met_no_server_is_made_later(pool: CrewPool):
    run_id = plan(pool)
    async with CrewWorker(pool.name, name="goes on", limit=1) as worker:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(worker.client, "read_deployment", AsyncMock(side_effect=httpx.ConnectError("refused")))
            await submit(worker, run_id)
        await until(lambda: not worker.limiter.borrowed_tokens)
        assert pool.states(str(run_id))[-1] == "Pending"
        await look(worker)
        assert pool.states(str(run_id))[-1] == "AwaitingRetry"


async def test_a_flow_run_begins_on_one_worker_only(pool: CrewPool, ran: AsyncMock):
    run_id = plan(pool)
    async with CrewWorker(pool.name, name="one") as one, CrewWorker(pool.name, name="two") as two:
        for worker in (one, two):
            await submit(worker, run_id)
        assert await in_store(workers.holder, str(run_id)) == one.boot
    assert ran.await_count == 1
    assert pool.states(str(run_id)).count("Pending") == 1


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("problem", ["deleted", "no answer"])
async def test_one_problem_holds_nobody(pool: CrewPool, monkeypatch: pytest.MonkeyPatch, problem: str):
    bad, good = plan(pool), plan(pool)
    monkeypatch.setattr("prefect_crew.worker.AGAIN_AFTER", 0.0)
    async with CrewWorker(pool.name, name="heir") as worker:
        for run_id in (bad, good):
            await worker.client.set_flow_run_state(run_id, Running(), force=True)
            await in_store(workers.hold, str(run_id), worker.boot)
        read = worker.client.read_flow_run

        async def read_but_one(flow_run_id: UUID) -> FlowRun:
            if flow_run_id == bad and problem == "no answer":
                raise httpx.ReadTimeout("no answer")
            return await read(flow_run_id)

        monkeypatch.setattr(worker.client, "read_flow_run", read_but_one)
        if problem == "deleted":
            await worker.client.delete_flow_run(bad)
        await look(worker)
        assert pool.states(str(good))[-1] == "AwaitingRetry"
        assert await in_store(workers.held_by, worker.boot) == ([] if problem == "deleted" else [str(bad)])
        monkeypatch.undo()


@pytest.mark.usefixtures("unwatched")
async def test_a_worker_that_begins_before_its_server_lives_once_the_server_does(pool: CrewPool):
    worker = CrewWorker(pool.name, name="early")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "sync_with_backend", AsyncMock(side_effect=httpx.ConnectError("refused")))
        await worker.__aenter__()
    try:
        assert await worker.get_and_submit_flow_runs() == []
        await worker.sync_with_backend()
        await worker._beat()
        assert await in_store(workers.hold, str(uuid4()), worker.boot), "it counts as alive"
    finally:
        await worker.__aexit__(None, None, None)


@pytest.mark.usefixtures("unwatched")
async def test_a_flow_run_takes_no_thread_and_no_signal(pool: CrewPool, monkeypatch: pytest.MonkeyPatch):
    """Prefect's engine passes over signals, heartbeats and its watch for suspensions, and says so to nobody."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WORKER_MODULES", USER_FLOWS)
    monkeypatch.syspath_prepend(IMPORTABLE)
    handler = signal.getsignal(signal.SIGTERM)

    def threads() -> list[str]:
        """Return those of Prefect for one flow run, which have no name of their own."""
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("Thread-")]

    async with CrewWorker(pool.name, name="counts") as worker:
        before = threads()
        runs = [plan(pool, seconds=4) for _ in range(3)]
        for run_id in runs:
            await worker.client.set_flow_run_state(run_id, Running(), force=True)
        running = [asyncio.create_task(worker.run(*await resolve(worker, run_id))) for run_id in runs]
        await until(lambda: all(pool.states(str(run_id)).count("Running") >= 2 for run_id in runs))
        await asyncio.sleep(1)
        assert threads() == before
        assert signal.getsignal(signal.SIGTERM) is handler
        await asyncio.gather(*running)
    assert {pool.states(str(run_id))[-1] for run_id in runs} == {"Completed"}


def test_a_prefect_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(BaseWorker, "_release_limit_slot")
    with pytest.raises(ConfigurationError, match=r"lacks: _release_limit_slot\. No flow run was begun"):
        CrewWorker("a pool")


# Prefect's pause, which is cut off between two polls, leaves its own sleep unawaited.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_a_paused_flow_run_that_loses_its_slot_begins_again(
    prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WORKER_MODULES", USER_FLOWS)
    monkeypatch.syspath_prepend(IMPORTABLE)
    for name, seconds in (("_RENEWAL_FRACTION", 0.005), ("_RENEWAL_RETRY_BASE_DELAY", 0.1)):
        monkeypatch.setattr(f"prefect.concurrency._leases.{name}", seconds)
    # A pool of its own: the workers of the other tests, which take any flow run of theirs, renew rarely.
    with CrewPool(prefect_server, tmp_path) as pool, connected(prefect_server, pool.folder / "home"):
        run_id = pool.start(pool.deploy("paused", f"{USER_FLOWS}.asks", concurrency_limit=1))
        async with CrewWorker(pool.name, name="pauses") as worker:
            flow_run = await worker.client.read_flow_run(UUID(run_id))
            await worker._submit_scheduled_flow_runs([WorkerFlowRunResponse.model_construct(flow_run=flow_run)])
            await until(lambda: pool.states(run_id)[-2:] == ["Paused", "AwaitingRetry"])
        assert "Crashed" not in pool.states(run_id)


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
        wait_until(lambda: self.crew.kickoffs == before + count, what=f"{count} kickoffs")
        asked = self.crew.requests["status"]
        wait_until(lambda: self.crew.requests["status"] >= asked + count, what="waits")
        wait_until(lambda: all(map(self.owner, runs)), what="their owners")
        return runs

    def begin(self, flow: str, **parameters: Any) -> str:
        """Start a worker and a flow run of the user's, and return its id once it waits for the crew."""
        self.pool.worker("one")
        run_id = self.pool.start(self.pool.deploy(flow, f"{USER_FLOWS}.{flow}"), **parameters)
        wait_until(lambda: self.crew.requests["status"] > 0, what="the wait")
        return run_id

    def cancel(self, run_id: str) -> None:
        self.pool.set_state(run_id, "CANCELLING")
        assert self.pool.wait_for(run_id)["state_name"] == "Cancelled"

    def owner(self, run_id: str) -> str:
        """Return the name of the worker that holds a flow run, "" for none."""
        return self.pool.holders().get(run_id, ("", ""))[0]

    def owners(self, runs: list[str]) -> set[str]:
        """Return the starts of workers that hold flow runs."""
        return {self.pool.holders()[run_id][1] for run_id in runs}

    def stopped(self) -> int:
        """Return how many requests have stopped the crew's only run."""
        assert [run.state for run in self.crew.runs] == ["stopped"]
        return self.crew.requests["stop"]

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
def test_cancelling_stops_the_crew(handed: Handed, is_gone: bool):
    one = handed.pool.worker("one")
    (run_id,) = handed.start(1)
    if is_gone:
        one.kill()
    handed.pool.set_state(run_id, "CANCELLING")
    if is_gone:
        handed.pool.worker("one")
    assert handed.pool.wait_for(run_id)["state_name"] == "Cancelled"
    assert handed.stopped() == 1


def test_cancelling_stops_a_crew_before_the_wait_for_it(handed: Handed):
    pool = handed.pool
    pool.worker("one")
    run_id = pool.start(pool.deploy("starts", f"{USER_FLOWS}.starts_and_sleeps"), seconds=300)
    wait_for_log(pool, run_id, "was kicked off")
    handed.cancel(run_id)
    assert handed.stopped() == 1


def test_a_hook_of_a_cancelled_flow_run_may_start_a_crew(handed: Handed):
    quick = handed.pool.add_crew("quick", QUICK)
    handed.cancel(handed.begin("cleans_up"))
    assert [run.state for run in quick.runs] == ["completed"]


HOW = pytest.mark.parametrize("how", ["task", "thread", "submitted task"])


@HOW
def test_a_cancelled_flow_runs_tasks_start_no_further_crew(handed: Handed, how: str):
    pool, crew = handed.pool, handed.crew
    run_id = handed.begin("spawns", how=how)
    handed.cancel(run_id)

    def has_gone_on() -> bool:
        return crew.kickoffs > 1 or pool.logs(run_id).count("FlowRunCancelledError") >= 2

    wait_until(has_gone_on, what="its next two starts")
    assert handed.stopped() == 1


@HOW
def test_a_suspended_flow_runs_crews_wait_for_its_resumption(handed: Handed, how: str):
    pool, crew = handed.pool, handed.crew
    run_id = handed.begin("spawns", how=how)
    suspend(pool, run_id)
    pool.call("POST", f"/flow_runs/{run_id}/resume", {})
    wait_until(lambda: pool.logs(run_id).count("three crews") == 2, what="its resumption")
    asked = crew.requests["status"]
    wait_until(lambda: crew.requests["status"] > asked + 3, what="both waits")
    handed.program.ended = True
    assert pool.wait_for(run_id)["state_name"] == "Completed"
    wait_until(lambda: "starts no crew" in pool.logs(), what="a refused start")
    assert crew.kickoffs == 3
    assert crew.requests["stop"] == 0


def test_a_task_without_a_wait_starts_all_its_crews(handed: Handed):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns"), how="task without a wait")
    assert pool.wait_for(run_id)["state_name"] == "Completed"
    handed.program.ended = True
    wait_until(lambda: [run.state for run in crew.runs] == ["completed"] * 3, what="three crews")


def test_a_thread_of_a_timed_out_flow_run_starts_no_more(handed: Handed):
    pool, crew = handed.pool, handed.crew
    pool.worker("one")
    run_id = pool.start(pool.deploy("spawns", f"{USER_FLOWS}.spawns_in_time"), how="thread")
    assert pool.wait_for(run_id)["state_name"] == "TimedOut"
    handed.program.ended = True
    wait_until(lambda: "starts no crew" in pool.logs(), what="a refused start")
    assert crew.kickoffs == 1
    assert crew.requests["stop"] == 0


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_retry_begins_after_the_tasks_of_the_attempt_before(pool: CrewPool, is_cancelled: bool):
    pool.worker("one")
    flow = f"{USER_FLOWS}.retries_beside_a_task"
    run_id = pool.start(pool.deploy("retries", flow), seconds=60 if is_cancelled else 3)
    wait_for_log(pool, run_id, "the first attempt fails")
    if is_cancelled:
        pool.set_state(run_id, "CANCELLING")
    assert pool.wait_for(run_id)["state_name"] == ("Cancelled" if is_cancelled else "Completed")
    if not is_cancelled:
        for text in ("the task of attempt 1 ends", "attempt 2 begins"):
            wait_for_log(pool, run_id, text)
        assert pool.logs(run_id).index("the task of attempt 1 ends") < pool.logs(run_id).index("attempt 2 begins")


def suspend(pool: CrewPool, run_id: str) -> None:
    state = {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True}}
    pool.call("POST", f"/flow_runs/{run_id}/set_state", {"state": state})
    wait_for_log(pool, run_id, "ended on this worker")


def test_a_suspended_flow_run_goes_on_when_it_is_resumed(handed: Handed):
    pool, crew = handed.pool, handed.crew
    quick = pool.add_crew("quick", QUICK)
    run_id = handed.begin("four_steps")
    suspend(pool, run_id)
    handed.program.ended = True
    wait_until(lambda: crew.runs[0].state == "completed", what="the crew has gone on")
    assert pool.flow_run(run_id)["state_name"] == "Suspended"
    assert "step four begins" not in pool.logs(run_id)
    pool.call("POST", f"/flow_runs/{run_id}/resume", {})
    assert pool.wait_for(run_id)["state_name"] == "Completed"
    assert pool.states(run_id)[-4:] == ["Resuming", "Pending", "Running", "Completed"]
    wait_for_log(pool, run_id, "step four begins")
    assert pool.logs(run_id).count("step one begins") == 1
    assert quick.kickoffs == 1
    assert crew.kickoffs == 1
    assert crew.requests["stop"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("times", "state"), [(1, "AwaitingRetry"), (10**6, "Running")])
def test_a_flow_that_swallows_cancellations_holds_no_worker(handed: Handed, times: int, state: str):
    pool, one = handed.pool, handed.pool.worker("one")
    deployment = pool.deploy("swallows", f"{USER_FLOWS}.swallows")
    cancelled, kept = (pool.start(deployment, times=number) for number in (1, times))
    for run_id in (cancelled, kept):
        pool.wait_for(run_id, "RUNNING")
    handed.cancel(cancelled)
    one.process.send(signal.SIGTERM)
    one.process.wait()
    assert pool.flow_run(kept)["state_name"] == state


@pytest.mark.slow
@pytest.mark.parametrize("heir", ["one", "two"])
def test_the_crew_of_a_run_that_prefect_cancelled_is_stopped(tmp_path: Path, prefect_template: Path | None, heir: str):
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
        run = pool.wait_for(run_id)
        assert "cancellation timed out" in run["state"]["message"], "the server has ended it"
        assert [run.state for run in handed.crew.runs] == ["running"]
        pool.worker(heir)
        wait_until(lambda: handed.crew.runs[0].state == "stopped", what="the crew is stopped")
        assert handed.crew.requests["stop"] == 1
        assert pool.states(run_id).count("Cancelled") == 1
        assert "dead-letter" not in server.log.read_text()


@pytest.mark.slow
def test_a_worker_that_was_frozen_gives_up_what_it_has_lost(handed: Handed):
    one = handed.pool.worker("one")
    runs = handed.start(3)
    one.process.send(signal.SIGSTOP)
    two = handed.pool.worker("two")
    wait_until(lambda: {*map(handed.owner, runs)} == {"two"}, what="the other worker has them")
    one.process.send(signal.SIGCONT)
    wait_until(lambda: "was taken by another worker" in one.log.read_text(), what="it notices")
    assert {*map(handed.owner, runs)} == {"two"}
    assert handed.crew.requests["stop"] == 0
    handed.end(runs)
    assert two.process.running
    for run_id in runs:
        states = handed.pool.states(run_id)
        assert states[-1] == "Completed"
        assert states.count("Running") == 2, "taken over once"


@pytest.mark.slow
def test_two_workers_that_are_given_one_name_go_on_as_two(handed: Handed):
    workers = [handed.pool.worker("one")]
    runs = handed.start(3)
    workers.append(handed.pool.worker("one"))
    wait_until(lambda: "Another worker 'one' runs" in workers[0].log.read_text(), "one notices")
    runs += handed.start(3)

    before = handed.owners(runs)
    time.sleep(4 * handed.pool.heartbeat)
    assert handed.owners(runs) == before, "nobody takes a flow run from one that lives"
    handed.end(runs)
    assert all(worker.process.running for worker in workers)
    for run_id in runs:
        assert handed.pool.states(run_id).count("Running") <= 2, "lost once at most"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["worker", "work queue", "deployment"])
def test_a_limits_slot_is_free_after_each_handing_over(handed: Handed, what: str):
    pool, crew = handed.pool, handed.crew
    limit: dict[str, Any] = {"concurrency_limit": 1} if what == "deployment" else {}
    deployment = pool.deploy("limited", **limit)
    if what == "work queue":
        command("prefect", "work-queue", "set-concurrency-limit", "default", "1", "--pool", pool.name, env=pool.env)
    started = partial(pool.worker, "one", limit=1 if what == "worker" else None)
    one = started()
    runs = [pool.start(deployment, crew="on-command", inputs={"topic": f"topic {number}"}) for number in range(3)]
    for end in (signal.SIGTERM, signal.SIGKILL, None):
        wait_until(lambda: crew.kickoffs >= 1, what="a kickoff")
        asked = crew.requests["status"]
        wait_until(lambda asked=asked: crew.requests["status"] > asked + 6, what="looks at the crew")
        assert [pool.flow_run(run_id)["state_type"] for run_id in runs].count("RUNNING") == 1
        if end is not None:
            one.process.send(end)
            one.process.wait()
            one = started()
    handed.program.ended = True
    for run_id in runs:
        assert pool.wait_for(run_id)["state_name"] == "Completed"
    assert crew.kickoffs == 3
