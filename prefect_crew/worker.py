"""The crew worker: it runs flow runs as coroutines of one process, and adopts those of a worker that is gone.

A flow run names its worker, and that worker's start, in `infrastructure_pid`. Giving a flow run back to its pool, on a
shutdown or because its worker is gone, is one thing: `hand_over`. The pool then hands it out again. What an earlier
start of the same worker has left Running begins here at once. The flow finds its crew's run by the run record.
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
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import anyio.abc
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    Operator,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.context import AsyncClientContext
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker
from prefect.exceptions import (
    Abort,
    InfrastructureNotAvailable,
    InfrastructureNotFound,
    ObjectNotFound,
    Pause,
)
from prefect.flows import Flow
from prefect.logging.handlers import APILogWorker
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry, Cancelled, Failed
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult
from pydantic import Field

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.flow_engine import HeldFlowRun, check_prefect, many_flow_runs, run_held_flow
from prefect_crew._internal.prefect_api import read_all_flow_runs
from prefect_crew._internal.prefect_errors import HTTP_ERRORS, PREFECT_ERRORS, STATUS_ERRORS, is_away
from prefect_crew.blocks import find_crew
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.keys import forget_calls
from prefect_crew.records.model import RunRecord
from prefect_crew.records.prune import prune_regularly
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import open_runs_of, stop_run, stop_was_asked
from prefect_crew.settings import CrewSettings, documentation_url

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse


POOL_DESCRIPTION = (
    "Runs flows of prefect-crew, and asynchronous flows of your own, as coroutines of a few small processes. A flow "
    "run that waits for a crew holds no process. Start a worker: prefect worker start --pool NAME. "
    "Documentation: prefect-crew docs guides/crew-worker."
)
LOOK_EVERY = 2.0
"""Seconds between two looks for flow runs that are being cancelled or were suspended."""
UNOWNED_FOR = 60.0
"""Seconds for which a flow run may be Pending, or between two owners, before it counts as left behind: the worker that
takes it names itself right after, and until then an earlier owner may still be named."""
CANCELLED_UNOWNED_FOR = 10.0
"""The same for one that is being cancelled, also where its worker is gone: one that lives cancels it before."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30. A kickoff that is being sent is waited
for. Then the process ends, and another worker adopts what was not given back."""
AWAY_PAUSE = 5.0
"""Seconds between two requests to a Prefect server that is away, after the pauses of Prefect's own client."""
ADOPTIONS_AT_ONCE = 10
STOPS_AT_ONCE = 10
"""Flow runs that are ended as Cancelled at the same time, and crews of one of them that are asked to stop."""


# The flow runs of a pool, as the Prefect server knows them


HANDED_OVER = "handed over"
"""What stands in `infrastructure_pid` of a flow run that went back to its pool: no worker's name."""
PAGE = 200
"""Flow runs that the server gives at once, at most."""
CANCELLING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
SUSPENDED_NAMES = ["Suspended", "Resuming"]
"""States of a flow run whose coroutine has to end: somebody suspended it, and may have resumed it since. A flow run
that is Paused waits in its coroutine, for a form or for the end of `pause_flow_run`."""
BEGUN = (
    FlowRunFilterState(
        operator=Operator.or_,  # pyright: ignore[reportCallIssue]
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.PAUSED]),
        name=FlowRunFilterStateName(any_=["AwaitingRetry"]),
    ),
)


async def read_flow_runs(client: PrefectClient, pool: str, *states: FlowRunFilterState) -> list[FlowRun]:
    """Return the flow runs of a pool in these kinds of states."""
    flow_runs: list[FlowRun] = []
    for state in states:
        of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
        flow_runs += await read_all_flow_runs(
            client, flow_run_filter=FlowRunFilter(state=state), work_pool_filter=of_pool
        )
    return flow_runs


async def read_workers(client: PrefectClient, pool: str) -> dict[str, bool]:
    """Return the workers of a pool by their names, and whether each is online."""
    workers = await client.read_workers_for_work_pool(pool)
    return {worker.name: worker.status == WorkerStatus.ONLINE for worker in workers}


def worker_name(infrastructure_pid: str | None) -> str | None:
    """Return the worker that an `infrastructure_pid` names, None where it names none."""
    name, slash, _ = (infrastructure_pid or "").rpartition("/")
    return name if slash else None


def is_suspended(state: State[Any]) -> bool:
    """Return whether a flow run in this state holds no worker until somebody resumes it."""
    return state.is_paused() and bool(state.state_details.pause_reschedule)


def is_orphan(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none: its own is not among those online."""
    state, name = flow_run.state, worker_name(flow_run.infrastructure_pid)
    if state is None or is_suspended(state):
        return False
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool hands it out
    if name is None:
        # Between two owners. Where it is not Pending, its worker has died while it handed the flow run over.
        return state.is_pending() or flow_run.infrastructure_pid == HANDED_OVER
    return not workers.get(name, False)


async def hand_over(client: PrefectClient, flow_run_id: UUID, why: str, *, only_from: UUID | None = None) -> bool:
    """Give a flow run back to its pool, which hands it out again; return whether that was done.

    It is not where the flow run has ended, is suspended, is the pool's already, or is not in the state `only_from` any
    more. `why` is the message of its new state.

    A flow run that waits for a retry "in process" is handed out by no pool: so its policy is changed first. Being
    handed over is not an attempt that failed, but the server counts it as one: so there is one retry more.
    """
    flow_run = await client.read_flow_run(flow_run_id)
    state, policy = flow_run.state, flow_run.empirical_policy
    if state is None or state.is_final() or is_suspended(state) or only_from not in (None, state.id):
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
    """Stop the crews whose runs a flow run, or a subflow of it, has started. A second call asks no crew again.

    Rows of a batch are in its ledger, not here: `prefect-crew batch cancel` stops those.
    """
    log, limit = flow_run_logger(flow_run), asyncio.Semaphore(STOPS_AT_ONCE)

    async def stop(record: RunRecord) -> None:
        if record.kickoff_id is None:
            text = "The kickoff of run %r is uncertain: if it started a run, that continues at %s."
            log.warning(text, record.idempotency_key, record.crew_url)
            return
        try:
            crew = await find_crew(record)
            if crew is None:
                raise ConfigurationError(f"no block {record.crew!r} has its address")
            async with limit:
                answer = await stop_run(LiveRun(crew, record.kickoff_id), idempotency_key=record.idempotency_key)
            log.info("Crew run %s was asked to stop: %s.", record.kickoff_id, answer.outcome)
        except (CrewError, *PREFECT_ERRORS) as error:
            text = "Crew run %s could not be stopped (%s): it continues at %s."
            log.warning(text, record.kickoff_id, error, record.crew_url)

    open_runs = await open_runs_of(client, flow_run)
    await asyncio.gather(*(stop(record) for record in open_runs if not stop_was_asked(record)))


# What a worker runs


def load_flow(entrypoint: str | None, *, allowed: Iterable[str] | None = None) -> Flow[..., Any]:
    """Import an asynchronous flow by its path, such as `my_package.flows.my_flow`.

    `allowed` are modules in addition to this package's, each with all below it; any module if left out.

    Raises:
        ConfigurationError: It is no such path, is not allowed, cannot be imported, or is no asynchronous flow.
    """
    module, _, name = (entrypoint or "").rpartition(".")
    if not module or not {":", "/"}.isdisjoint(entrypoint or ""):
        raise ConfigurationError(
            f"{entrypoint!r} is not an import path of a flow, such as my_package.flows.my_flow. Deploy a flow in a "
            "file to a process work pool: prefect deploy."
        )
    permitted = None if allowed is None else ["prefect_crew", *allowed]
    if permitted is not None and not any(
        module == package or module.startswith(f"{package}.") for package in permitted
    ):
        raise ConfigurationError(
            f"This crew worker is not allowed to import {module}. Add it to PREFECT_INTEGRATIONS_CREW_WORKER_MODULES "
            f"where the worker starts. Allowed: {', '.join(permitted)}."
        )
    try:
        flow = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        reason = f"{error}" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigurationError(
            f"The flow {entrypoint} cannot be imported ({reason}): install its package here and where the worker runs."
        ) from error
    if not isinstance(flow, Flow):
        raise ConfigurationError(f"{entrypoint} is not a flow: decorate the function with @flow.")
    if flow.isgenerator:
        raise ConfigurationError(
            f"The flow {entrypoint} is a generator, and a crew worker runs flows that return: return what it yields, "
            "or deploy it to a process work pool: prefect deploy."
        )
    if not flow.isasync:
        raise ConfigurationError(
            f"The flow {entrypoint} is synchronous, and a crew worker runs asynchronous ones only: write it as `async "
            "def`, or deploy it to a process work pool: prefect deploy."
        )
    return cast("Flow[..., Any]", flow)


class CrewJobConfiguration(BaseJobConfiguration):
    """What a deployment may set for a crew worker: nothing. Flow runs share the worker's process and environment."""

    without_effect: list[str] = Field(default=[], description="The job variables that somebody has set.")
    entrypoint: str | None = Field(default=None, description="The import path of the deployment's flow.")
    flow_run_id: UUID | None = Field(default=None, description="The flow run that this was made for.")

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
        self.entrypoint, self.flow_run_id = deployment and deployment.entrypoint, flow_run.id
        self.without_effect = sorted(
            {**((deployment and deployment.job_variables) or {}), **(flow_run.job_variables or {})}
        )
        self._related_objects = {"deployment": deployment, "flow": flow, "flow-run": flow_run}


class CrewWorkerResult(BaseWorkerResult):
    """What became of a flow run on this worker."""

    exit_code: int = 0
    """What a process of its own would have ended with. As `status_code`, Prefect would set the flow run to Crashed."""


class CrewWorker(BaseWorker[CrewJobConfiguration, Any, CrewWorkerResult]):
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
    _documentation_url = documentation_url()
    _logo_url = "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/webhook.png"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.boot: str = uuid4().hex[:12]
        self._held: dict[UUID, HeldFlowRun] = {}
        self._leave_until: float | None = None
        self._confirmed_at = _clock()
        self._workers: dict[str, bool] = {}
        self._orphaned_since: dict[UUID, float] = {}  # by the id of their states
        self._cancelling_since: dict[UUID, float] = {}
        self._taken_over: set[UUID] = set()
        self._ending_cancelled = asyncio.Semaphore(STOPS_AT_ONCE)

    @property
    def identity(self) -> str:
        """What its flow runs name as their owner: its name, which holds no slash, and the number of this start."""
        return f"{self.name}/{self.boot}"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return a template without variables: there is nothing to set. The server takes no empty configuration."""
        return {"job_configuration": {"name": None}, "variables": {"type": "object", "properties": {}}}

    # Start and end

    async def setup(self) -> None:
        """Prepare the worker: what all flow runs share, and the look for cancelled and orphaned ones."""
        check_prefect()
        await super().setup()
        await self._exit_stack.enter_async_context(AsyncClientContext.get_or_create())
        self._exit_stack.enter_context(many_flow_runs(self._logger.warning))
        for work in (self._watch_pool(), prune_regularly(self._logger)):
            self._exit_stack.push_async_callback(cancel_and_wait, asyncio.create_task(work))
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
            if self._held:
                # The event loop would wait for their coroutines, which no cancellation ends, as long as they last.
                printer(f"Worker {self.name!r} leaves {len(self._held)} flow runs to be adopted: they did not end.")
                await asyncio.to_thread(_send_logs_and_events)
                os._exit(1)
            if main is not None:
                main.cancel()

        def on_signal() -> None:
            if shutdown:
                os.kill(os.getpid(), signal.SIGKILL)
            printer(f"Worker {self.name!r} shuts down: {len(self._held)} flow runs go back to the pool, crews run on.")
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
        while (self._held or self._submitting_flow_run_ids) and time.monotonic() < self._leave_until:
            for held in list(self._held.values()):
                held.end("handed over", why)
            await asyncio.sleep(0.1)

    async def _leave(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        """Wait for flow runs after `--run-once`; give them back where the worker ends by an error of its own."""
        if error is not None:
            await self.hand_over_all(f"Worker {self.name!r} ended.")
            return
        while self._held or self._submitting_flow_run_ids:  # noqa: ASYNC110 - Prefect's part of them has no event
            await asyncio.sleep(0.1)

    async def sync_with_backend(self) -> None:
        """Send a heartbeat, and describe the pool where it has no description."""
        await super().sync_with_backend()
        pool = self._work_pool
        if pool is not None and pool.description is None:
            pool.description = POOL_DESCRIPTION
            await self.client.update_work_pool(pool.name, WorkPoolUpdate(description=POOL_DESCRIPTION))

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        return [] if self._leave_until is not None else await super()._get_scheduled_flow_runs()

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Begin a flow run; later where the Prefect server is away. Prefect's own method would end the worker then."""
        try:
            await super()._submit_run(flow_run)
        except HTTP_ERRORS as error:
            if not is_away(error):
                raise
            # It came from before: nothing of the flow run has begun.
            self._logger.warning("The Prefect server does not answer (%s): flow run %r waits.", error, flow_run.name)
            self._taken_over.discard(flow_run.id)
            if self._cancelling_observer is not None:
                self._cancelling_observer.remove_in_flight_flow_run_id(flow_run.id)
            self._release_limit_slot(flow_run.id)
            self._submitting_flow_run_ids.discard(flow_run.id)

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
        if error is not None and is_away(error):
            self._logger.warning("The Prefect server does not answer (%s): flow run %r waits.", error, flow_run.name)
            return
        await super()._propose_crashed_state(flow_run, message, client)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        """Return whether a flow run may begin. One that is taken over begins as it is, Running."""
        if flow_run.id not in self._taken_over:
            return await super()._propose_pending_state(flow_run)
        self._taken_over.discard(flow_run.id)
        return True

    async def _propose_submitting_state(self, flow_run: FlowRun) -> None:
        """Nothing is submitted to anywhere: the coroutine begins at once."""

    # One flow run

    async def run(
        self,
        flow_run: FlowRun,
        configuration: CrewJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> CrewWorkerResult:
        """Run a flow run to its end, whatever that is: the state on the server tells it."""
        if (before := self._held.get(flow_run.id)) is not None and before.task is not None:
            before.end("lost", "Another worker had taken the flow run, and it came back.")
            await asyncio.wait({before.task})
        forget_calls(str(flow_run.id))
        held = self._held[flow_run.id] = HeldFlowRun(flow_run, self._confirm)
        try:
            if task_status is not None:
                task_status.started(self.identity)
            held.task = asyncio.create_task(self._execute(held, configuration), name=f"Flow run {flow_run.name!r}")
            await asyncio.wait({held.task})
            if held.ending == "handed over":
                await hand_over(self.client, flow_run.id, held.reason)
            elif held.ending == "cancelled":
                await self._end_cancelled(flow_run, held.reason)
            elif held.ending == "suspended":
                await self._leave_suspended(flow_run.id)
        finally:
            if self._held.get(flow_run.id) is held:
                del self._held[flow_run.id]
        has_crashed = held.ending is None and (held.task.cancelled() or held.task.result())
        return CrewWorkerResult(identifier=self.identity, status_code=0, exit_code=int(has_crashed))

    def _emit_flow_run_executed_event(
        self, result: BaseWorkerResult, configuration: BaseJobConfiguration, submitted_event: Event | None = None
    ) -> None:
        if isinstance(result, CrewWorkerResult):
            result = result.model_copy(update={"status_code": result.exit_code})
        super()._emit_flow_run_executed_event(result, configuration, submitted_event)

    async def _execute(self, held: HeldFlowRun, configuration: CrewJobConfiguration) -> bool:
        """Run the flow, and return whether it has crashed; nothing that it raises gets out of here."""
        flow_run = held.flow_run
        log = flow_run_logger(flow_run)
        if configuration.without_effect:
            log.warning(
                "The job variables %s have no effect: flow runs share the process of the crew worker. Set environment "
                "variables where the worker starts.",
                ", ".join(configuration.without_effect),
            )
        try:
            flow = load_flow(configuration.entrypoint, allowed=CrewSettings().worker_modules)
            state = await self._run_flow(flow, held)
            if state.is_cancelling():
                held.end("cancelled", "Flow run was cancelled.")
            return state.is_crashed()
        except ConfigurationError as error:
            log.error("%s", error)  # noqa: TRY400 - the sentence says it all
            with contextlib.suppress(Abort):
                await propose_state(self.client, Failed(message=str(error)), flow_run_id=flow_run.id)
        except asyncio.CancelledError:
            if held.ending is None:
                raise
            if held.ending == "suspended":
                log.info("The flow run ended on this worker: it is suspended. Its crews run on.")
        except (Abort, Pause) as signal_of_prefect:
            log.info("The flow run ended on this worker: %s", signal_of_prefect)
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            log.warning("Only this flow run ends: the crew worker continues.")
            return True
        except Exception as error:
            log.exception("The flow run could not be run.")
            await self._propose_crashed_state(flow_run, f"The worker could not run it: {type(error).__name__}: {error}")
            return True
        return False

    async def _run_flow(self, flow: Flow[Any, Any], held: HeldFlowRun) -> State[Any]:
        """Run a flow run; again from its top where the Prefect server was away before the flow began."""
        while True:
            try:
                return await run_held_flow(flow, held)
            except HTTP_ERRORS as error:
                if not is_away(error):
                    raise
                self._logger.warning(
                    "The Prefect server does not answer (%s): flow run %r waits.", error, held.flow_run.name
                )
                await asyncio.sleep(AWAY_PAUSE)

    async def _confirm(self, held: HeldFlowRun, state: State[Any]) -> None:
        """End a flow run as lost if another worker has it, or as suspended where its flow ends right after that.

        The server is asked for a last state, which it would take over Suspended, and where this worker may have been
        taken for dead: it was frozen, or cut off.
        """
        if state.is_final() or self._may_count_as_gone():
            current = await self.client.read_flow_run(held.flow_run.id)
            if self._may_count_as_gone():
                self._end_if_lost(current)
            if current.state_name in SUSPENDED_NAMES:
                held.end("suspended", "Flow run was suspended.")

    def _may_count_as_gone(self) -> bool:
        return _clock() - self._confirmed_at >= 2 * self.heartbeat_interval_seconds

    def _end_if_lost(self, current: FlowRun) -> None:
        held = self._held.get(current.id)
        if held is None or self._is_own(current.infrastructure_pid):
            return
        self._logger.warning("Flow run %r was taken by another worker: it ends here.", current.name)
        held.end("lost", f"Another worker has taken flow run {current.name!r}.")
        if worker_name(current.infrastructure_pid) == self.name:
            # A worker takes what an earlier start under its name has left, at once: two of one name that live would
            # take each other's flow runs for ever.
            name = f"{self.name}-{self.boot}"
            text = "Another worker %r runs: this one continues as %r. Give each worker of a pool its own name."
            self._logger.warning(text, self.name, name)
            self.name = name
            if self._worker_channel is not None:  # it has kept the old name; `_watch_pool` has a new one made
                self._worker_channel.stop()
                self._worker_channel = None

    def _is_own(self, infrastructure_pid: str | None) -> bool:
        return (infrastructure_pid or "").endswith(f"/{self.boot}")

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: CrewJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """End a flow run of this worker, or stop the crews of a cancelled flow run that no worker has.

        Prefect calls it for a flow run that is cancelled before it has begun, and for a flow run that the Prefect
        server itself has ended as Cancelled because no worker did.

        Raises:
            InfrastructureNotFound: No worker has the flow run.
            InfrastructureNotAvailable: Another worker, which is online, has it.
        """
        flow_run_id = configuration.flow_run_id
        held = None if flow_run_id is None else self._held.get(flow_run_id)
        if held is not None and self._is_own(infrastructure_pid):
            held.end("cancelled", "Flow run was cancelled.")
            if held.task is not None:
                await asyncio.wait({held.task}, timeout=grace_seconds)
            return
        name = worker_name(infrastructure_pid)
        # What names this worker, and does not run here, has ended or is of an earlier start.
        if not self._is_own(infrastructure_pid) and name not in (None, self.name):
            self._workers = await read_workers(self.client, self._work_pool_name)
            if self._workers.get(name, False):
                raise InfrastructureNotAvailable(f"Worker {name!r}, which is online, has {infrastructure_pid}.")
        if flow_run_id is not None and held is None:
            flow_run = await self.client.read_flow_run(flow_run_id)
            state = flow_run.state
            # One that was begun again since then waits for its crews.
            if (
                flow_run.start_time is not None
                and state is not None
                and (state.is_cancelling() or state.is_cancelled())
            ):
                await stop_crews_of(self.client, flow_run)
        raise InfrastructureNotFound(f"No worker has {infrastructure_pid}.")

    # All flow runs of the pool

    async def _watch_pool(self) -> None:
        """Look for flow runs that are being cancelled, suspended, lost, and that another worker has left behind."""
        heartbeat_due = 0.0
        while True:
            try:
                read_at = _clock()
                cancelling = await read_flow_runs(self.client, self._work_pool_name, CANCELLING)
                self._cancelling_since = {
                    flow_run.id: self._cancelling_since.get(flow_run.id, read_at) for flow_run in cancelling
                }
                await self._end_suspended_ones()
                if self._may_count_as_gone():
                    await self._end_lost_ones()
                if read_at >= heartbeat_due:
                    await self._adopt_orphans()
                    heartbeat_due = read_at + self.heartbeat_interval_seconds
                if self._worker_channel is None:
                    await self.sync_with_backend()
                await self._cancel_all(cancelling)
                self._confirmed_at = read_at
            except PREFECT_ERRORS as error:
                self._logger.debug("The Prefect server could not be asked: %s", error)
            except Exception:
                # One flow run that cannot be dealt with must not be the last one that is looked for.
                self._logger.exception("Looking for flow runs that are cancelled or left behind failed.")
            await asyncio.sleep(LOOK_EVERY)

    async def _end_suspended_ones(self) -> None:
        """End the coroutines of flow runs that somebody has suspended; their crews run on."""
        before = dict(self._held)  # what begins during the request may have been resumed just before
        if not before:
            return
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=SUSPENDED_NAMES))
        flow_run_filter = FlowRunFilter(id=FlowRunFilterId(any_=list(before)), state=state)
        for flow_run in await read_all_flow_runs(self.client, flow_run_filter=flow_run_filter):
            held = self._held.get(flow_run.id)
            if held is not None and held is before[flow_run.id]:
                held.end("suspended", "Flow run was suspended.")

    async def _end_lost_ones(self) -> None:
        """End the coroutines of flow runs that another worker has taken."""
        ids = list(self._held)
        for start in range(0, len(ids), PAGE):
            chunk = FlowRunFilterId(any_=ids[start : start + PAGE])
            for flow_run in await self.client.read_flow_runs(flow_run_filter=FlowRunFilter(id=chunk), limit=PAGE):
                self._end_if_lost(flow_run)

    async def _adopt_orphans(self) -> None:
        """Adopt what a worker that is gone has left, as soon as that is sure."""
        await self._end_lost_ones()  # also while its heartbeats arrive: another worker may have been given its name
        self._workers = await read_workers(self.client, self._work_pool_name)
        if not self._workers.get(self.name, True):
            # Its heartbeats did not arrive. The next one may be minutes away: Prefect makes fewer the longer the server
            # is away.
            await self.sync_with_backend()
        now = _clock()
        orphans = {
            flow_run.state.id: flow_run
            for flow_run in await read_flow_runs(self.client, self._work_pool_name, *BEGUN)
            if flow_run.state is not None and self._is_orphan(flow_run)
        }
        since = {state_id: self._orphaned_since.get(state_id, now) for state_id in orphans}
        sure = [state_id for state_id, at in since.items() if now - at >= self._unsure_for(orphans[state_id])]
        self._orphaned_since = {state_id: at for state_id, at in since.items() if state_id not in sure}
        limit = asyncio.Semaphore(ADOPTIONS_AT_ONCE)
        await asyncio.gather(*(self._adopt(orphans[state_id], limit) for state_id in sure))

    def _is_orphan(self, flow_run: FlowRun) -> bool:
        if flow_run.id in self._held or flow_run.id in self._submitting_flow_run_ids:
            return False
        # What an earlier start under this worker's own name has left is an orphan too, and what is this one's but does
        # not run here.
        return is_orphan(flow_run, {**self._workers, self.name: False})

    def _unsure_for(self, flow_run: FlowRun) -> float:
        """Return the seconds for which an orphan has to look like one."""
        name = worker_name(flow_run.infrastructure_pid)
        if name is None or (flow_run.state is not None and flow_run.state.is_pending()):
            return UNOWNED_FOR
        # An earlier start under this worker's own name is over. Another worker may only seem to be gone, where the
        # server itself was away; and what this one has just ended is not yet seen as ended.
        is_of_earlier_start = name == self.name and not self._is_own(flow_run.infrastructure_pid)
        return 0.0 if is_of_earlier_start else float(self.heartbeat_interval_seconds)

    async def _adopt(self, flow_run: FlowRun, limit: asyncio.Semaphore) -> None:
        """Begin an orphan here or give it back to the pool, if no other worker does."""
        owner = worker_name(flow_run.infrastructure_pid) or "unknown"
        why = f"Worker {owner!r} is gone. The flow run starts again, and its crew's run is found by its record."
        try:
            async with limit:
                if await self._claim(flow_run) and (
                    await self._take_over(flow_run, why)
                    or await hand_over(self.client, flow_run.id, why, only_from=flow_run.state_id)
                ):
                    self._logger.warning("Flow run %r is adopted: worker %r is gone.", flow_run.name, owner)
        except (Abort, Pause, ObjectNotFound) as error:
            self._logger.info("Flow run %r is not adopted: %s", flow_run.name, error)

    async def _take_over(self, flow_run: FlowRun, why: str) -> bool:
        """Begin what an earlier start under this worker's name has left Running; return whether it begins here.

        The way over the pool changes its state three times and not once: hundreds of them would take the server twice
        as long. It is taken where a limit holds: a deployment's, whose slot Pending takes, or this worker's own.
        """
        if worker_name(flow_run.infrastructure_pid) != self.name or self._leave_until is not None:
            return False
        current = await self.client.read_flow_run(flow_run.id)
        state, policy = current.state, current.empirical_policy
        if state is None or state.id != flow_run.state_id or not state.is_running():
            return False
        if state.state_details.deployment_concurrency_lease_id is not None:
            return False
        policy.retries = policy.retries and policy.retries + 1  # as in `hand_over`
        self._taken_over.add(current.id)
        if not await self._submit_scheduled_flow_runs([WorkerFlowRunResponse.model_construct(flow_run=current)]):
            self._taken_over.discard(current.id)
            return False
        flow_run_logger(current).warning(why)
        return True

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Return whether this worker is the one to deal with an orphaned state: one worker creates the input."""
        for number in range(1, 100):
            key = f"adopted-{flow_run.state_id}-{number}"
            try:
                await self.client.create_flow_run_input(flow_run.id, key, json.dumps(self.identity))
            except STATUS_ERRORS as error:
                if error.response.status_code != 409:
                    raise
            else:
                return True
            claimer = str(json.loads(await self.client.read_flow_run_input(flow_run.id, key)))
            if claimer == self.identity:
                return True  # an earlier try of this worker's that got no further
            name = claimer.rpartition("/")[0]
            if name != self.name and self._workers.get(name, False):
                return False  # it is alive, and is about to do it
        return False

    async def _cancel_all(self, flow_runs: Iterable[FlowRun]) -> None:
        """Cancel flow runs at the same time, and raise the first problem after all have been dealt with."""
        problems = await asyncio.gather(*map(self._cancel, flow_runs), return_exceptions=True)
        for problem in filter(None, problems):
            raise problem

    async def _cancel(self, flow_run: FlowRun) -> None:
        """Cancel a flow run that is Cancelling: its coroutine here, or what a worker that is gone has left of it."""
        held = self._held.get(flow_run.id)
        if held is not None:
            held.end("cancelled", "Flow run was cancelled.")
            return
        waited = _clock() - self._cancelling_since[flow_run.id]
        if waited < CANCELLED_UNOWNED_FOR or not self._is_orphan(flow_run):
            return
        self._workers = await read_workers(self.client, self._work_pool_name)  # its own may have started since
        if (
            self._is_orphan(flow_run)
            and await self._claim(flow_run)
            and (await self.client.read_flow_run(flow_run.id)).state_id == flow_run.state_id
        ):
            self._logger.warning("Flow run %r is being cancelled, and no worker has it.", flow_run.name)
            await self._end_cancelled(flow_run, "Flow run was cancelled while no worker had it.")

    async def _leave_suspended(self, flow_run_id: UUID) -> None:
        """Have the pool hand a suspended flow run out once it is resumed, also where its last attempt is a retry."""
        policy = (await self.client.read_flow_run(flow_run_id)).empirical_policy
        if policy.retry_type == "in_process":
            policy = policy.model_copy(update={"retry_type": "reschedule"})
            await self.client.update_flow_run(flow_run_id, empirical_policy=policy)

    async def _end_cancelled(self, flow_run: FlowRun, why: str) -> None:
        """End a flow run as Cancelled.

        Its own coroutine stops the crew that it waits for. This stops one that an earlier attempt has started, where
        the coroutine had not come so far yet, or was not there.
        """
        async with self._ending_cancelled:
            if flow_run.start_time is not None:
                await stop_crews_of(self.client, flow_run)
            await self.client.set_flow_run_state(flow_run.id, Cancelled(message=why), force=True)


def _send_logs_and_events() -> None:
    """Send what Prefect holds back of logs and events, as it does at the end of a process."""
    for stream in (APILogWorker, EventsWorker):
        stream.drain_all(timeout=2)
    for output in (sys.stdout, sys.stderr):
        output.flush()


def _clock() -> float:
    """Return seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
