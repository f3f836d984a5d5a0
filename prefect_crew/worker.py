"""Flow runs of a pool of crew workers that have lost their worker, as the Prefect server knows it, and their ends.

Apart from the worker itself, whose import takes longer: `prefect-crew doctor` looks as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import anyio.abc
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.context import AsyncClientContext, FlowRunContext
from prefect.exceptions import Abort, InfrastructureNotAvailable, ObjectNotFound, Pause, PrefectException
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry, Cancelled, Failed
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult
from pydantic import PrivateAttr

from prefect_crew._internal.flow_engine import Ending, many_flow_runs, run_flow_here
from prefect_crew.blocks import find_crew
from prefect_crew.client._transport import shared_connections
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.actions import stop_run
from prefect_crew.runs.stop import stop_was_asked
from prefect_crew.settings import CrewSettings

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse, WorkerFlowRunResponse


HANDED_OVER = "handed over"
"""What stands in `infrastructure_pid` of a flow run that went back to its pool: no worker's name."""
PAGE = 200
"""Flow runs that the server gives at once, at most."""


def _types(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


CANCELLING = _types(StateType.CANCELLING)
STARTED = _types(StateType.RUNNING, StateType.PENDING, StateType.PAUSED)
RETRYING = FlowRunFilterState(name=FlowRunFilterStateName(any_=["AwaitingRetry"]))


async def flow_runs_of(client: PrefectClient, pool: str, state: FlowRunFilterState) -> list[FlowRun]:
    """Return the flow runs of a pool in a kind of state."""
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=state),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


async def begun_flow_runs(client: PrefectClient, pool: str) -> list[FlowRun]:
    """Return the flow runs of a pool that have begun and not ended, those that wait for a retry among them."""
    return [*await flow_runs_of(client, pool, STARTED), *await flow_runs_of(client, pool, RETRYING)]


async def workers_of(client: PrefectClient, pool: str) -> dict[str, bool]:
    """Return the workers of a pool by their names, and whether each is online."""
    workers = await client.read_workers_for_work_pool(pool)
    return {worker.name: worker.status == WorkerStatus.ONLINE for worker in workers}


def owner_name(flow_run: FlowRun) -> str | None:
    """Return the worker that has, or had, a flow run; None where none has named itself."""
    name, slash, _ = (flow_run.infrastructure_pid or "").rpartition("/")
    return name if slash else None


def is_orphan(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none: its own is not among those online."""
    state, name = flow_run.state, owner_name(flow_run)
    if state is None or (state.is_paused() and state.state_details.pause_reschedule):
        return False  # suspended: nobody holds it
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool hands it out
    if name is None:
        # Between two owners. Where it is not Pending, its worker has died while it handed the flow run over.
        return state.is_pending() or flow_run.infrastructure_pid == HANDED_OVER
    return not workers.get(name, False)


async def hand_over(client: PrefectClient, flow_run_id: UUID, why: str, *, only_from: UUID | None = None) -> bool:
    """Give a flow run back to its pool, which hands it out again; return whether that was done.

    It is not where the flow run is in another state, has ended, or is the pool's already.

    A flow run that waits for a retry "in process" is handed out by no pool: so its policy is changed first. Being
    handed over is no attempt that failed, but the server counts it as one: so there is one retry more.

    Args:
        client: A Prefect client.
        flow_run_id: The flow run.
        why: The message of its new state.
        only_from: The id of the state that it must be in.
    """
    flow_run = await client.read_flow_run(flow_run_id)
    state, policy = flow_run.state, flow_run.empirical_policy
    if state is None or state.is_final() or only_from not in (None, state.id):
        return False
    retry_at = None
    if state.is_scheduled():
        if policy.retry_type != "in_process":
            return False
        retry_at = state.state_details.scheduled_time
    policy = policy.model_copy(update={"retry_type": "reschedule", "retries": policy.retries and policy.retries + 1})
    await client.update_flow_run(flow_run_id, empirical_policy=policy, infrastructure_pid=HANDED_OVER)
    await propose_state(client, AwaitingRetry(message=why, scheduled_time=retry_at), flow_run_id=flow_run_id)
    return True


async def stop_crews_of(client: PrefectClient, flow_run: FlowRun) -> None:
    """Stop the crews whose runs a flow run, or a subflow of it, has started and nobody else waits for.

    Rows of a batch are in its ledger, not here: `prefect-crew batch cancel` stops those.
    """
    records = PrefectRecords()
    ids = {str(one) for one in await _with_subflows(client, flow_run.id)}
    log = flow_run_logger(flow_run)
    async for record in records.all():
        if record.flow_run_id not in ids or record.phase not in (RecordPhase.STARTED, RecordPhase.UNCERTAIN):
            continue
        if stop_was_asked(record):
            continue
        if record.kickoff_id is None:
            text = "The kickoff of run %r is uncertain: a run that it started runs on at %s."
            log.warning(text, record.idempotency_key, record.crew_url)
            continue
        if others := await records.other_waiters(record, record.flow_run_id):
            log.warning("Crew run %s runs on: flow run %s waits for it too.", record.kickoff_id, ", ".join(others))
            continue
        try:
            crew = await find_crew(record)
            if crew is None:
                raise ConfigurationError(f"no block {record.crew!r} has its address")
            answer = await stop_run(crew, record.kickoff_id, idempotency_key=record.idempotency_key)
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            log.warning(
                "Crew run %s could not be stopped (%s): it runs on at %s.", record.kickoff_id, error, record.crew_url
            )
        else:
            log.info("Crew run %s was asked to stop: %s.", record.kickoff_id, answer.outcome)


async def _with_subflows(client: PrefectClient, flow_run_id: UUID) -> list[UUID]:
    found, at = [flow_run_id], 0
    while at < len(found):
        parents = FlowRunFilterParentFlowRunId(any_=found[at:])
        at = len(found)
        found += [
            one.id for one in await client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
        ]
    return found


POOL_DESCRIPTION = (
    "Runs flows of prefect-crew, and asynchronous flows of your own, as coroutines of a few small processes. A flow "
    "run that waits for a crew holds no process. Start a worker: prefect worker start --pool NAME."
)
LOOK_EVERY = 2.0
"""Seconds between two looks for flow runs that are being cancelled."""
FULL_LOOK_EVERY = 300.0
"""Seconds between two looks through all flow runs of the pool for orphans, while its workers stay the same."""
UNOWNED_FOR = 60.0
"""Seconds for which a flow run may be Pending, or between two owners, before it counts as left behind: the worker that
takes it names itself right after, and until then an earlier owner may still be named."""
CANCELLED_UNOWNED_FOR = 10.0
"""The same for one that is being cancelled."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30. A kickoff that is being sent is waited
for; what is not given back by then is adopted later."""
AWAY_PAUSE = 5.0
"""Seconds between two requests to a Prefect server that is away, after the pauses of Prefect's own client."""
ADOPTED_AT_ONCE = 10
"""Flow runs that are adopted at the same time: each takes five requests to the Prefect server."""
BLOCKED_AFTER = 5.0
"""Seconds that one step of a coroutine may take before its flow run is named in a warning."""


def load_flow(entrypoint: str | None, *, allowed: Iterable[str] | None = None) -> Flow[..., Any]:
    """Import an asynchronous flow by its path, such as `my_package.flows.my_flow`.

    Args:
        entrypoint: A module, a dot, and the flow's name in it.
        allowed: Modules besides this package's, each with all below it; any module if left out.

    Raises:
        ConfigurationError: It is no such path, its module is not allowed or cannot be imported, or it is no
            asynchronous flow. The message says what to do.
    """
    module, _, name = (entrypoint or "").rpartition(".")
    if not module or ":" in module or "/" in module:
        raise ConfigurationError(
            f"{entrypoint!r} is no import path of a flow, such as my_package.flows.my_flow. Deploy a flow in a file to "
            "a process work pool: prefect deploy."
        )
    permitted = None if allowed is None else ["prefect_crew", *allowed]
    if permitted is not None and not any(module == one or module.startswith(f"{one}.") for one in permitted):
        raise ConfigurationError(
            f"This crew worker does not import {module}: add it to PREFECT_INTEGRATIONS_CREW_WORKER_MODULES where the "
            f"worker starts. It imports {', '.join(permitted)}."
        )
    try:
        flow = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        told = f"{error}" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigurationError(
            f"The flow {entrypoint} cannot be imported ({told}): install its package here and where the worker runs."
        ) from error
    if not isinstance(flow, Flow):
        raise ConfigurationError(f"{entrypoint} is no flow: decorate the function with @flow.")
    if not flow.isasync or flow.isgenerator:
        raise ConfigurationError(
            f"The flow {entrypoint} is synchronous, and a crew worker runs asynchronous ones only: write it as `async "
            "def`, or deploy it to a process work pool: prefect deploy."
        )
    return cast("Flow[..., Any]", flow)


class CrewJobConfiguration(BaseJobConfiguration):
    """What a deployment may set for a crew worker: nothing. Flow runs share the worker's process and environment."""

    _deployment: DeploymentResponse | None = PrivateAttr(default=None)
    _flow_run_id: UUID | None = PrivateAttr(default=None)

    @property
    def entrypoint(self) -> str | None:
        """The import path of the deployment's flow."""
        return None if self._deployment is None else self._deployment.entrypoint

    @property
    def flow_run_id(self) -> UUID | None:
        """The flow run that this configuration was made for."""
        return self._flow_run_id

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: Any = None,
        work_pool: Any = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Keep what `run` needs; there is no command, environment or label to prepare."""
        self._deployment, self._flow_run_id = deployment, flow_run.id
        self._related_objects = {"deployment": deployment, "flow": flow, "flow-run": flow_run}


@dataclass(eq=False)
class _FlowRunHere:
    """One flow run whose coroutine runs in this worker. It is what the engine asks (`flow_engine.Owner`)."""

    worker: CrewWorker
    flow_run: FlowRun
    ending: Ending | None = None
    why: str = ""
    task: asyncio.Task[None] | None = None

    def end(self, ending: Ending, why: str) -> None:
        """End the coroutine. What it may still say to the server depends on why; lost is the last word."""
        if self.ending is None or ending == "lost":
            self.ending, self.why = ending, why
            if self.task is not None:
                self.task.cancel()

    async def confirm(self) -> None:
        await self.worker.confirm(self)


class CrewWorker(BaseWorker[CrewJobConfiguration, Any, BaseWorkerResult]):
    """Runs flow runs as coroutines of its own process.

    Example:
        ```bash
        prefect work-pool create crews --type crew
        prefect worker start --pool crews
        ```
    """

    type = "crew"
    job_configuration = CrewJobConfiguration
    _description = POOL_DESCRIPTION
    _display_name = "Crew"
    _documentation_url = "https://docs.crewai.com/en/api-reference/introduction"
    _logo_url = "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/webhook.png"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.boot = uuid4().hex[:12]
        self._here: dict[UUID, _FlowRunHere] = {}
        self._leave_until: float | None = None
        self._confirmed_at = _clock()
        self._workers: dict[str, bool] = {}
        self._suspects: dict[UUID, float] = {}
        self._cancelling: dict[UUID, float] = {}
        self._full_look_at: float | None = None

    @property
    def identity(self) -> str:
        """What its flow runs name as their owner: its name, which holds no slash, and the number of this start."""
        return f"{self.name}/{self.boot}"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return a template without variables: there is nothing to set. The server takes no empty configuration."""
        return {"job_configuration": {"name": None}, "variables": {"type": "object", "properties": {}}}

    # Life

    async def setup(self) -> None:
        """Prepare the worker: what all flow runs share, and the look for cancelled and orphaned ones."""
        await super().setup()
        await self._exit_stack.enter_async_context(AsyncClientContext.get_or_create())
        self._exit_stack.enter_context(many_flow_runs())
        self._exit_stack.enter_context(_contained_exits())
        self._exit_stack.enter_context(_warning_when_blocked(self._logger.warning))
        await self._exit_stack.enter_async_context(shared_connections())
        await self._exit_stack.enter_async_context(_in_background(self._look_around()))
        self._exit_stack.push_async_exit(self._leave)  # the last, so that all of this is there until flow runs ended

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Run until a signal ends it. The first SIGTERM or SIGINT gives its flow runs back, the second kills it."""
        with self._handling_signals(printer):
            await super().start(run_once=run_once, with_healthcheck=with_healthcheck, printer=printer)

    @contextlib.contextmanager
    def _handling_signals(self, printer: Callable[..., None]) -> Generator[None]:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        shutdown: list[asyncio.Task[None]] = []

        async def shut_down() -> None:
            await self.hand_over_all(f"Worker {self.name!r} shuts down.")
            if main is not None:
                main.cancel()

        def on_signal() -> None:
            if shutdown:
                os.kill(os.getpid(), signal.SIGKILL)
            printer(f"Worker {self.name!r} shuts down: {len(self._here)} flow runs go back to the pool, crews run on.")
            shutdown.append(loop.create_task(shut_down()))

        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            yield  # asyncio takes no handlers here
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def hand_over_all(self, why: str) -> None:
        """Take no new flow runs, and give all that run here, or are about to, back to the pool."""
        if self._leave_until is None:
            self._leave_until = time.monotonic() + HAND_OVER_WITHIN
        while (self._here or self._submitting_flow_run_ids) and time.monotonic() < self._leave_until:
            for here in list(self._here.values()):
                here.end("handed over", why)
            await asyncio.sleep(0.1)

    async def _leave(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        """Wait for flow runs after `--run-once`; give them back where the worker ends by an error of its own."""
        if error is not None:
            await self.hand_over_all(f"Worker {self.name!r} ended.")
            return
        while self._here or self._submitting_flow_run_ids:  # noqa: ASYNC110 - Prefect's part of them has no event
            await asyncio.sleep(0.1)

    async def sync_with_backend(self) -> None:
        """Send a heartbeat, and describe the pool where nobody has."""
        await super().sync_with_backend()
        pool = self._work_pool
        if pool is not None and pool.description is None:
            pool.description = POOL_DESCRIPTION
            await self.client.update_work_pool(pool.name, WorkPoolUpdate(description=POOL_DESCRIPTION))

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        return [] if self._leave_until is not None else await super()._get_scheduled_flow_runs()

    async def _give_worker_labels_to_flow_run(self, flow_run_id: UUID) -> None:
        """Name this worker as the owner while the flow run is Pending. Prefect's own worker does so too late for that.

        Labels with the worker's name would cost a request each and say no more.
        """
        await self.client.update_flow_run(flow_run_id, infrastructure_pid=self.identity)

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        """Say that a flow run crashed, unless it is the Prefect server that was away: then it is adopted later."""
        error = sys.exception()
        if isinstance(error, httpx.HTTPError) and is_away(error):
            self._logger.warning("The Prefect server is away (%s): flow run %r waits.", error, flow_run.name)
            return
        await super()._propose_crashed_state(flow_run, message, client)

    async def _propose_submitting_state(self, flow_run: FlowRun) -> None:
        """Nothing is submitted to anywhere: the coroutine begins at once."""

    # One flow run

    async def run(
        self,
        flow_run: FlowRun,
        configuration: CrewJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> BaseWorkerResult:
        """Run a flow run to its end, whatever that is: the state on the server tells it."""
        if (before := self._here.get(flow_run.id)) is not None and before.task is not None:
            before.end("lost", "Another worker had taken the flow run, and it came back.")
            await asyncio.wait({before.task})
        here = self._here[flow_run.id] = _FlowRunHere(self, flow_run)
        try:
            if task_status is not None:
                task_status.started(self.identity)
            here.task = asyncio.create_task(self._execute(here, configuration), name=f"flow run {flow_run.name}")
            await asyncio.wait({here.task})
            if here.ending == "handed over":
                await hand_over(self.client, flow_run.id, here.why)
            elif here.ending == "cancelled":
                await self._end_cancelled(flow_run, here.why)
        finally:
            if self._here.get(flow_run.id) is here:
                del self._here[flow_run.id]
        return BaseWorkerResult(identifier=self.identity, status_code=0)

    async def _execute(self, here: _FlowRunHere, configuration: CrewJobConfiguration) -> None:
        """Run the flow; nothing that it raises gets out of here."""
        flow_run = here.flow_run
        log = flow_run_logger(flow_run)
        try:
            flow = load_flow(configuration.entrypoint, allowed=CrewSettings().worker_modules)
            state = await self._until_prefect_answers(here, flow)
            if state.is_cancelling():
                here.end("cancelled", "Flow run was cancelled.")
        except ConfigurationError as error:
            log.error("%s", error)  # noqa: TRY400 - the sentence says it all
            await self._propose(flow_run, Failed(message=str(error)))
        except asyncio.CancelledError:
            if here.ending is None:
                raise
        except (Abort, Pause) as signal_of_prefect:
            log.info("The flow run goes on no further here: %s", signal_of_prefect)
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            log.warning("Only this flow run ends: the crew worker goes on.")
        except Exception as error:
            log.exception("The flow run could not be run.")
            await self._propose_crashed_state(flow_run, f"The worker could not run it: {type(error).__name__}: {error}")

    async def _until_prefect_answers(self, here: _FlowRunHere, flow: Flow[Any, Any]) -> State[Any]:
        """Run a flow run; again from its top where the Prefect server was away before the flow began."""
        while True:
            try:
                return await run_flow_here(flow, here.flow_run, here.flow_run.parameters, here)
            except httpx.HTTPError as error:
                if not is_away(error):
                    raise
                self._logger.warning("The Prefect server is away (%s): flow run %r waits.", error, here.flow_run.name)
                await asyncio.sleep(AWAY_PAUSE)

    async def confirm(self, here: _FlowRunHere) -> None:
        """Return if a flow run is still this worker's; end it as lost if another one has it.

        The server is asked only where this worker may have been taken for dead: it was frozen, or cut off.
        """
        if _clock() - self._confirmed_at < 2 * self.heartbeat_interval_seconds:
            return
        current = await self.client.read_flow_run(here.flow_run.id)
        if not self._owns(current):
            here.end("lost", f"Another worker has taken flow run {current.name!r}.")

    def _owns(self, flow_run: FlowRun) -> bool:
        return flow_run.infrastructure_pid == self.identity

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: CrewJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Cancel a flow run of this worker. Prefect calls it for those that are cancelled before they have begun.

        Raises:
            InfrastructureNotAvailable: Another worker has it, and cancels it.
        """
        here = None if configuration.flow_run_id is None else self._here.get(configuration.flow_run_id)
        if here is None:
            raise InfrastructureNotAvailable(f"{infrastructure_pid} is another worker.")
        here.end("cancelled", "Flow run was cancelled.")
        if here.task is not None:
            await asyncio.wait({here.task}, timeout=grace_seconds)

    # Looking around

    async def _look_around(self) -> None:
        """Look for flow runs that are being cancelled, that are lost, and that another worker has left behind."""
        heartbeat_due = 0.0
        while True:
            try:
                asked = _clock()
                cancelling = await flow_runs_of(self.client, self._work_pool_name, CANCELLING)
                self._cancelling = {one.id: self._cancelling.get(one.id, asked) for one in cancelling}
                if asked - self._confirmed_at > 2 * self.heartbeat_interval_seconds:
                    await self._end_lost_ones()
                if asked >= heartbeat_due:
                    await self._look_for_orphans()
                    heartbeat_due = asked + self.heartbeat_interval_seconds
                for flow_run in cancelling:
                    await self._cancel(flow_run)
                self._confirmed_at = asked
            except (httpx.HTTPError, PrefectException) as error:
                self._logger.debug("The Prefect server could not be asked: %s", error)
            except Exception:
                # One flow run that cannot be dealt with must not be the last one that is looked for.
                self._logger.exception("Looking for flow runs that are cancelled or left behind failed.")
            await asyncio.sleep(LOOK_EVERY)

    async def _end_lost_ones(self) -> None:
        """End the coroutines whose flow runs another worker has taken meanwhile."""
        ids = list(self._here)
        for start in range(0, len(ids), PAGE):
            chunk = FlowRunFilterId(any_=ids[start : start + PAGE])
            for flow_run in await self.client.read_flow_runs(flow_run_filter=FlowRunFilter(id=chunk), limit=PAGE):
                here = self._here.get(flow_run.id)
                if here is not None and not self._owns(flow_run):
                    self._logger.warning("Flow run %r was taken by another worker: it ends here.", flow_run.name)
                    here.end("lost", f"Another worker has taken flow run {flow_run.name!r}.")

    async def _look_for_orphans(self) -> None:
        """Adopt what a worker that is gone has left, as soon as that is sure."""
        workers = await workers_of(self.client, self._work_pool_name)
        if not workers.get(self.name, True):
            # Its heartbeats did not arrive, so it may have been taken for dead. The next one may be minutes away:
            # Prefect makes fewer the longer the server is away.
            await self._end_lost_ones()
            await self.sync_with_backend()
        now = _clock()
        changed, self._workers = workers != self._workers, workers
        if not (changed or self._suspects or self._full_look_at is None or now - self._full_look_at > FULL_LOOK_EVERY):
            return
        self._full_look_at = now
        seen = {
            flow_run.state.id: flow_run
            for flow_run in await begun_flow_runs(self.client, self._work_pool_name)
            if flow_run.state is not None and self._is_orphan(flow_run)
        }
        suspects = {state_id: self._suspects.get(state_id, now) for state_id in seen}
        sure = {state_id for state_id, since in suspects.items() if now - since >= self._patience_with(seen[state_id])}
        self._suspects = {state_id: since for state_id, since in suspects.items() if state_id not in sure}
        limit = asyncio.Semaphore(ADOPTED_AT_ONCE)

        async def adopt(flow_run: FlowRun) -> None:
            async with limit:
                await self._adopt(flow_run)

        await asyncio.gather(*(adopt(seen[state_id]) for state_id in sure))

    def _is_orphan(self, flow_run: FlowRun) -> bool:
        if flow_run.id in self._here or flow_run.id in self._submitting_flow_run_ids:
            return False
        # What an earlier start under this worker's own name has left is an orphan too, and what is this one's but does
        # not run here.
        return is_orphan(flow_run, {**self._workers, self.name: False})

    def _patience_with(self, flow_run: FlowRun) -> float:
        """Return the seconds for which an orphan has to look like one."""
        name = owner_name(flow_run)
        if name is None or (flow_run.state is not None and flow_run.state.is_pending()):
            return UNOWNED_FOR
        # An earlier start under this worker's own name is over. Another worker may only seem to be gone, where the
        # server itself was away; and what this one has just ended is not yet seen as ended.
        earlier = name == self.name and not self._owns(flow_run)
        return 0.0 if earlier else float(self.heartbeat_interval_seconds)

    async def _adopt(self, flow_run: FlowRun) -> None:
        """Give an orphan back to the pool, if no other worker does."""
        try:
            if await self._claim(flow_run):
                owner = owner_name(flow_run) or "unknown"
                why = f"Worker {owner!r} is gone. The flow run starts again, and its crew's run is found by its record."
                if await hand_over(self.client, flow_run.id, why, only_from=flow_run.state_id):
                    self._logger.warning("Flow run %r is adopted: worker %r is gone.", flow_run.name, owner)
        except (Abort, Pause, ObjectNotFound) as error:
            self._logger.info("Flow run %r is not adopted: %s", flow_run.name, error)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Return whether this worker is the one to deal with an orphaned state: one worker creates the input."""
        for number in range(1, 100):
            key = f"adopted-{flow_run.state_id}-{number}"
            try:
                await self.client.create_flow_run_input(flow_run.id, key, json.dumps(self.identity))
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 409:
                    raise
            else:
                return True
            claimer = str(json.loads(await self.client.read_flow_run_input(flow_run.id, key)))
            if claimer == self.identity:
                return True  # an earlier try of this worker's that got no further
            name = claimer.rpartition("/")[0]
            if name != self.name and self._workers.get(name, False):
                return False  # it lives, and is about to do it
        return False

    # Cancelling

    async def _cancel(self, flow_run: FlowRun) -> None:
        """Cancel a flow run that is Cancelling: its coroutine here, or what a worker that is gone has left of it."""
        here = self._here.get(flow_run.id)
        if here is not None:
            here.end("cancelled", "Flow run was cancelled.")
        elif (
            self._is_orphan(flow_run)
            and self._is_left(flow_run)
            and await self._claim(flow_run)
            and (await self.client.read_flow_run(flow_run.id)).state_id == flow_run.state_id
        ):
            self._logger.warning("Flow run %r is being cancelled, and no worker has it.", flow_run.name)
            await self._end_cancelled(flow_run, "Flow run was cancelled while no worker had it.")

    def _is_left(self, flow_run: FlowRun) -> bool:
        """Return whether a flow run that is being cancelled, and looks like an orphan, has done so long enough."""
        since = self._cancelling[flow_run.id]
        gone = owner_name(flow_run) is not None and not self._owns(flow_run)
        return gone or _clock() - since >= CANCELLED_UNOWNED_FOR

    async def _end_cancelled(self, flow_run: FlowRun, why: str) -> None:
        """End a flow run as Cancelled.

        Its own coroutine stops the crew that it waits for. One that an earlier attempt has started runs on, where the
        coroutine had not come so far yet, or was not there.
        """
        if flow_run.start_time is not None:
            await stop_crews_of(self.client, flow_run)
        await self.client.set_flow_run_state(flow_run.id, Cancelled(message=why), force=True)

    async def _propose(self, flow_run: FlowRun, state: State[Any]) -> None:
        with contextlib.suppress(Abort):
            await propose_state(self.client, state, flow_run_id=flow_run.id)


def is_away(error: httpx.HTTPError) -> bool:
    """Return whether an error says that the Prefect server is away, and not what it thinks of a request."""
    return isinstance(error, httpx.TransportError) or (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
    )


def _clock() -> float:
    """Return seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@contextlib.asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


@contextlib.contextmanager
def _contained_exits() -> Generator[None]:
    """Keep a SystemExit in a task of a flow run from ending the event loop, and with it all other flow runs.

    asyncio raises it out of the loop itself, past whoever awaits the task.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()

    def create(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            work = _without_exit(work, context.flow_run)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(create)
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def _without_exit(work: Coroutine[Any, Any, Any], flow_run: FlowRun) -> Any:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as exit_:
        raise CrewError(f"A task of flow run {flow_run.name!r} raised {type(exit_).__name__}.") from exit_


@contextlib.contextmanager
def _warning_when_blocked(warn: Callable[..., None]) -> Generator[None]:
    """Name a flow run that holds the event loop up: while it does, no other goes on, and no heartbeat is sent."""
    loop_thread, ended = threading.get_ident(), threading.Event()
    beat = time.monotonic()

    async def beats() -> None:
        nonlocal beat
        while True:
            beat = time.monotonic()
            await asyncio.sleep(1.0)

    def watch() -> None:
        warned = 0.0
        while not ended.wait(1.0):
            seconds = time.monotonic() - beat
            if seconds < BLOCKED_AFTER or warned == beat:
                continue
            warned = beat
            frame = sys._current_frames().get(loop_thread)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - documented, for this
            at = frame and f"{frame.f_code.co_filename}:{frame.f_lineno}"
            name = _flow_run_of(frame)
            warn(
                "%s has held the event loop for %.0f s, at %s; all other flow runs wait meanwhile. Do such work in "
                "`await asyncio.to_thread(…)`, or deploy the flow to a process work pool.",
                f"Flow run {name!r}" if name else "Something",
                seconds,
                at,
            )

    task = asyncio.create_task(beats())
    thread = threading.Thread(target=watch, name="blocked event loop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        task.cancel()


def _flow_run_of(frame: FrameType | None) -> str | None:
    """Return the name of the flow run whose coroutine is on a stack: its outermost frame is one of this module's."""
    while frame is not None:
        if frame.f_code is _without_exit.__code__:
            return frame.f_locals["flow_run"].name
        if frame.f_code is CrewWorker._execute.__code__:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - of this module
            return frame.f_locals["here"].flow_run.name
        frame = frame.f_back
    return None
