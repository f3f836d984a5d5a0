"""The crew worker: it runs flow runs as coroutines of one process, and takes over the flow runs of a dead worker.

The `infrastructure_pid` of a flow run has the name of its worker and the number of that worker's start. `hand_over`
gives a flow run back to its pool, on a shutdown and after the death of its worker. The pool then hands it out again. A
flow run that an earlier start of the same worker has left Running begins here at once. The flow finds its crew's run by
the run record.
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
"""Seconds between two requests for cancelled and suspended flow runs."""
UNOWNED_FOR = 60.0
"""Seconds for which a flow run may be Pending, or between two owners, before it counts as left behind: the worker that
takes it writes its name right after, and until then the flow run may have the name of an earlier owner."""
CANCELLED_UNOWNED_FOR = 10.0
"""The same for a flow run that is Cancelling, also if its worker is gone: a living worker cancels it earlier."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30 s. The worker waits for kickoffs in
flight. Then the process ends, and another worker takes over the flow runs that were not given back."""
AWAY_PAUSE = 5.0
"""Seconds between two requests to a Prefect server that is away, in addition to the pauses of Prefect's own client."""
ADOPTIONS_AT_ONCE = 10
STOPS_AT_ONCE = 10
"""The most flow runs that are ended as Cancelled at the same time, and the most `/stop` requests for one of them."""


# The flow runs of a pool on the Prefect server


HANDED_OVER = "handed over"
"""The `infrastructure_pid` of a flow run that was given back to its pool: it is no worker's name."""
PAGE = 200
"""The most flow runs in one answer of the server."""
CANCELLING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
SUSPENDED_NAMES = ["Suspended", "Resuming"]
"""States in which the coroutine of a flow run has to end: somebody suspended the flow run, and may have resumed it
since. A Paused flow run waits in its coroutine, for a form or for the end of `pause_flow_run`."""
BEGUN = (
    FlowRunFilterState(
        operator=Operator.or_,  # pyright: ignore[reportCallIssue]
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.PAUSED]),
        name=FlowRunFilterStateName(any_=["AwaitingRetry"]),
    ),
)


async def read_flow_runs(client: PrefectClient, pool: str, *states: FlowRunFilterState) -> list[FlowRun]:
    """Return the flow runs of a pool that match one of the state filters."""
    flow_runs: list[FlowRun] = []
    for state in states:
        of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
        flow_runs += await read_all_flow_runs(
            client, flow_run_filter=FlowRunFilter(state=state), work_pool_filter=of_pool
        )
    return flow_runs


async def read_workers(client: PrefectClient, pool: str) -> dict[str, bool]:
    """Return for each worker of a pool, by its name, whether it is online."""
    workers = await client.read_workers_for_work_pool(pool)
    return {worker.name: worker.status == WorkerStatus.ONLINE for worker in workers}


def worker_name(infrastructure_pid: str | None) -> str | None:
    """Return the name of the worker in an `infrastructure_pid`, or None."""
    name, slash, _ = (infrastructure_pid or "").rpartition("/")
    return name if slash else None


def is_suspended(state: State[Any]) -> bool:
    """Return whether a flow run in this state needs no worker until somebody resumes it."""
    return state.is_paused() and bool(state.state_details.pause_reschedule)


def is_orphan(flow_run: FlowRun, workers: Mapping[str, bool]) -> bool:
    """Return whether a flow run that has begun needs a worker and has none: its own worker is not online."""
    state, name = flow_run.state, worker_name(flow_run.infrastructure_pid)
    if state is None or is_suspended(state):
        return False
    if state.is_scheduled() and flow_run.empirical_policy.retry_type != "in_process":
        return False  # the pool will hand it out
    if name is None:
        # Between two owners. If it is not Pending, its worker has died while it gave the flow run back.
        return state.is_pending() or flow_run.infrastructure_pid == HANDED_OVER
    return not workers.get(name, False)


async def hand_over(client: PrefectClient, flow_run_id: UUID, why: str, *, only_from: UUID | None = None) -> bool:
    """Give a flow run back to its pool, which hands it out again. Return whether this was done.

    Return False if the flow run has ended, is suspended, belongs to the pool already, or is not in the state
    `only_from` any more. `why` is the message of its new state.

    A pool hands out no flow run that waits for a retry "in process": so its policy is changed first. A handover is no
    failed attempt, but the server counts it as one: so the policy gets one retry more.
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
    """Stop the crews whose runs a flow run or its subflows started. A second call sends no second `/stop`.

    It does not stop the rows of a batch, which are in a ledger: `prefect-crew batch cancel` does.
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


# The flow of a deployment


def load_flow(entrypoint: str | None, *, allowed: Iterable[str] | None = None) -> Flow[..., Any]:
    """Import an asynchronous flow by its path, such as `my_package.flows.my_flow`.

    `allowed` are the allowed modules in addition to this package's, each with its submodules; None allows any module.

    Raises:
        ConfigurationError: The path is no such path, is not allowed, cannot be imported, or is no asynchronous flow.
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
    """A deployment can set nothing for a crew worker: flow runs share the worker's process and environment."""

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
        """Keep the facts for `run`; there is no command, environment or label to prepare."""
        self.entrypoint, self.flow_run_id = deployment and deployment.entrypoint, flow_run.id
        self.without_effect = sorted(
            {**((deployment and deployment.job_variables) or {}), **(flow_run.job_variables or {})}
        )
        self._related_objects = {"deployment": deployment, "flow": flow, "flow-run": flow_run}


class CrewWorkerResult(BaseWorkerResult):
    """The outcome of a flow run on this worker."""

    exit_code: int = 0
    """The exit code that a process of its own would have. With it as `status_code`, Prefect would set the flow run to
    Crashed."""


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
        """The owner in its flow runs: the worker's name, which has no slash, and the number of this start."""
        return f"{self.name}/{self.boot}"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return a template without variables: there is nothing to set. The server refuses an empty configuration."""
        return {"job_configuration": {"name": None}, "variables": {"type": "object", "properties": {}}}

    # Start and end

    async def setup(self) -> None:
        """Prepare the shared client and event loop, and start the watch for cancelled and orphaned flow runs."""
        check_prefect()
        await super().setup()
        await self._exit_stack.enter_async_context(AsyncClientContext.get_or_create())
        self._exit_stack.enter_context(many_flow_runs(self._logger.warning))
        for work in (self._watch_pool(), prune_regularly(self._logger)):
            self._exit_stack.push_async_callback(cancel_and_wait, asyncio.create_task(work))
        self._exit_stack.push_async_exit(self._leave)  # pushed last: it runs first, and waits for the flow runs

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
                # These coroutines ignore their cancellation, and the event loop would wait for them.
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
            yield  # asyncio allows no signal handlers here
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
        """Take no new flow runs, and give all flow runs that run here, or are about to, back to the pool."""
        if self._leave_until is None:
            self._leave_until = time.monotonic() + HAND_OVER_WITHIN
        while (self._held or self._submitting_flow_run_ids) and time.monotonic() < self._leave_until:
            for held in list(self._held.values()):
                held.end("handed over", why)
            await asyncio.sleep(0.1)

    async def _leave(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        """Wait for flow runs after `--run-once`; give them back if the worker ends with an error."""
        if error is not None:
            await self.hand_over_all(f"Worker {self.name!r} ended.")
            return
        while self._held or self._submitting_flow_run_ids:  # noqa: ASYNC110 - Prefect's part of them has no event
            await asyncio.sleep(0.1)

    async def sync_with_backend(self) -> None:
        """Send a heartbeat, and give the pool a description if it has none."""
        await super().sync_with_backend()
        pool = self._work_pool
        if pool is not None and pool.description is None:
            pool.description = POOL_DESCRIPTION
            await self.client.update_work_pool(pool.name, WorkPoolUpdate(description=POOL_DESCRIPTION))

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        return [] if self._leave_until is not None else await super()._get_scheduled_flow_runs()

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Begin a flow run. If the Prefect server is away, try later: Prefect's method would then end the worker."""
        try:
            await super()._submit_run(flow_run)
        except HTTP_ERRORS as error:
            if not is_away(error):
                raise
            # The error came before the flow run began.
            self._logger.warning("The Prefect server does not answer (%s): flow run %r waits.", error, flow_run.name)
            self._taken_over.discard(flow_run.id)
            if self._cancelling_observer is not None:
                self._cancelling_observer.remove_in_flight_flow_run_id(flow_run.id)
            self._release_limit_slot(flow_run.id)
            self._submitting_flow_run_ids.discard(flow_run.id)

    async def _give_worker_labels_to_flow_run(self, flow_run_id: UUID) -> None:
        """Name this worker as the owner while the flow run is still Pending. Prefect's own worker does so later.

        It writes no labels with the worker's name: they would cost a request each and have no other information.
        """
        await self.client.update_flow_run(flow_run_id, infrastructure_pid=self.identity)

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        """Set a flow run to Crashed, unless the Prefect server was away: then a worker takes it over later."""
        error = sys.exception()
        if error is not None and is_away(error):
            self._logger.warning("The Prefect server does not answer (%s): flow run %r waits.", error, flow_run.name)
            return
        await super()._propose_crashed_state(flow_run, message, client)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        """Return whether a flow run may begin. A flow run that was taken over begins without Pending: it is Running."""
        if flow_run.id not in self._taken_over:
            return await super()._propose_pending_state(flow_run)
        self._taken_over.discard(flow_run.id)
        return True

    async def _propose_submitting_state(self, flow_run: FlowRun) -> None:
        """Do nothing: there is no infrastructure, and the coroutine begins at once."""

    # One flow run

    async def run(
        self,
        flow_run: FlowRun,
        configuration: CrewJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> CrewWorkerResult:
        """Run a flow run to its end. Its state on the server says how it ended."""
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
        """Run the flow, and return whether it has crashed. Errors of the flow do not leave this method."""
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
            log.error("%s", error)  # noqa: TRY400 - the message needs no traceback
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
        """Run a flow run. If the Prefect server was away before the flow began, start again."""
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
        """Before a state is written: end the flow run as lost if another worker has it, or as suspended if it is.

        It asks the server in two cases: before a final state, which would replace Suspended, and if other workers may
        consider this worker dead, since it was frozen or cut off.
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
            # A worker at once takes over flow runs of an earlier start under its name: two living workers with one name
            # would take each other's flow runs for ever.
            name = f"{self.name}-{self.boot}"
            text = "Another worker %r runs: this one continues as %r. Give each worker of a pool its own name."
            self._logger.warning(text, self.name, name)
            self.name = name
            if self._worker_channel is not None:  # the channel has the old name; `_watch_pool` makes a new one
                self._worker_channel.stop()
                self._worker_channel = None

    def _is_own(self, infrastructure_pid: str | None) -> bool:
        return (infrastructure_pid or "").endswith(f"/{self.boot}")

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: CrewJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """End a flow run of this worker, or stop the crews of a cancelled flow run that no worker has.

        Prefect calls it for a flow run that is cancelled before it has begun, and for a flow run that the Prefect
        server has ended as Cancelled because no worker did.

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
        # A flow run with this worker's name that does not run here has ended, or belongs to an earlier start.
        if not self._is_own(infrastructure_pid) and name not in (None, self.name):
            self._workers = await read_workers(self.client, self._work_pool_name)
            if self._workers.get(name, False):
                raise InfrastructureNotAvailable(f"Worker {name!r}, which is online, has {infrastructure_pid}.")
        if flow_run_id is not None and held is None:
            flow_run = await self.client.read_flow_run(flow_run_id)
            state = flow_run.state
            # Only if it is still cancelled: a flow run that began again waits for its crews.
            if (
                flow_run.start_time is not None
                and state is not None
                and (state.is_cancelling() or state.is_cancelled())
            ):
                await stop_crews_of(self.client, flow_run)
        raise InfrastructureNotFound(f"No worker has {infrastructure_pid}.")

    # All flow runs of the pool

    async def _watch_pool(self) -> None:
        """Look again and again for flow runs that are cancelled, suspended, lost, or left behind by another worker."""
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
                # An error about one flow run must not end the watch for all others.
                self._logger.exception("Looking for flow runs that are cancelled or left behind failed.")
            await asyncio.sleep(LOOK_EVERY)

    async def _end_suspended_ones(self) -> None:
        """End the coroutines of flow runs that somebody has suspended; their crews run on."""
        before = dict(self._held)  # a flow run that begins during the request may have been resumed just before
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
        """Take over the flow runs of a worker that is surely gone."""
        await self._end_lost_ones()  # also while heartbeats arrive: another worker may have the same name
        self._workers = await read_workers(self.client, self._work_pool_name)
        if not self._workers.get(self.name, True):
            # This worker's heartbeats did not arrive. The next one may come minutes later: the longer the server is
            # away, the fewer Prefect sends.
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
        # Flow runs of an earlier start under this worker's name are orphans too, and so are flow runs of this start
        # that do not run here.
        return is_orphan(flow_run, {**self._workers, self.name: False})

    def _unsure_for(self, flow_run: FlowRun) -> float:
        """Return the seconds for which a flow run has to look like an orphan before it is taken over."""
        name = worker_name(flow_run.infrastructure_pid)
        if name is None or (flow_run.state is not None and flow_run.state.is_pending()):
            return UNOWNED_FOR
        # An earlier start under this worker's name has surely ended. Another worker may only seem to be gone, if the
        # server was away. And the state of a flow run that this worker has just ended may not be written yet.
        is_of_earlier_start = name == self.name and not self._is_own(flow_run.infrastructure_pid)
        return 0.0 if is_of_earlier_start else float(self.heartbeat_interval_seconds)

    async def _adopt(self, flow_run: FlowRun, limit: asyncio.Semaphore) -> None:
        """Begin an orphan here or give it back to the pool, unless another worker does."""
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
        """Begin a flow run that an earlier start under this worker's name has left Running. Return whether it begins.

        The way over the pool changes the state three times instead of once, and would take the server twice as long for
        hundreds of flow runs. It is needed only under a limit: a deployment's, whose slot a flow run takes at Pending,
        or this worker's own.
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
        """Return whether this worker may handle an orphan: of several workers, only one creates the flow run input."""
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
                return True  # an earlier try of this worker, which failed later
            name = claimer.rpartition("/")[0]
            if name != self.name and self._workers.get(name, False):
                return False  # the other worker is alive, and handles the orphan
        return False

    async def _cancel_all(self, flow_runs: Iterable[FlowRun]) -> None:
        """Cancel flow runs concurrently. Raise the first error after all are done."""
        problems = await asyncio.gather(*map(self._cancel, flow_runs), return_exceptions=True)
        for problem in filter(None, problems):
            raise problem

    async def _cancel(self, flow_run: FlowRun) -> None:
        """Cancel a flow run that is Cancelling: end its coroutine here, or if its worker is gone, stop its crews."""
        held = self._held.get(flow_run.id)
        if held is not None:
            held.end("cancelled", "Flow run was cancelled.")
            return
        waited = _clock() - self._cancelling_since[flow_run.id]
        if waited < CANCELLED_UNOWNED_FOR or not self._is_orphan(flow_run):
            return
        self._workers = await read_workers(self.client, self._work_pool_name)  # its worker may have started since
        if (
            self._is_orphan(flow_run)
            and await self._claim(flow_run)
            and (await self.client.read_flow_run(flow_run.id)).state_id == flow_run.state_id
        ):
            self._logger.warning("Flow run %r is being cancelled, and no worker has it.", flow_run.name)
            await self._end_cancelled(flow_run, "Flow run was cancelled while no worker had it.")

    async def _leave_suspended(self, flow_run_id: UUID) -> None:
        """Make the pool hand out a suspended flow run after it is resumed, also if its last attempt was a retry."""
        policy = (await self.client.read_flow_run(flow_run_id)).empirical_policy
        if policy.retry_type == "in_process":
            policy = policy.model_copy(update={"retry_type": "reschedule"})
            await self.client.update_flow_run(flow_run_id, empirical_policy=policy)

    async def _end_cancelled(self, flow_run: FlowRun, why: str) -> None:
        """End a flow run as Cancelled.

        Its own coroutine stops the crew that it waits for. This stops the crews that an earlier attempt started, if the
        coroutine did not reach their waits, or does not exist.
        """
        async with self._ending_cancelled:
            if flow_run.start_time is not None:
                await stop_crews_of(self.client, flow_run)
            await self.client.set_flow_run_state(flow_run.id, Cancelled(message=why), force=True)


def _send_logs_and_events() -> None:
    """Send the logs and events in Prefect's queues, as Prefect does at the end of a process."""
    for stream in (APILogWorker, EventsWorker):
        stream.drain_all(timeout=2)
    for output in (sys.stdout, sys.stderr):
        output.flush()


def _clock() -> float:
    """Return a clock in seconds that also runs while the machine sleeps, if the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
