"""The crew worker: it runs flow runs as coroutines of one process, and takes over the flow runs of a dead worker.

A worker that shuts down gives its flow runs back to the pool (`pool.hand_over`). A flow run that a dead worker has left
Running begins at once on the worker that takes it over, if a limit does not forbid it; all others go back to the pool.
The flow finds its crew's run in the crew database.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio.abc
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.context import AsyncClientContext
from prefect.events.worker import EventsWorker
from prefect.exceptions import Abort, InfrastructureNotAvailable, InfrastructureNotFound, ObjectNotFound, Pause
from prefect.flows import Flow
from prefect.logging.handlers import APILogWorker
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled, Failed
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult
from pydantic import Field

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.flow_engine import (
    AWAY_PAUSE,
    HeldFlowRun,
    check_prefect,
    many_flow_runs,
    queue_requests,
    run_held_flow,
    shared,
)
from prefect_crew._internal.prefect_api import held_flow_run, read_all
from prefect_crew._internal.prefect_errors import HTTP_ERRORS, PREFECT_ERRORS, STATUS_ERRORS, is_away
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.pool import (
    BEGUN,
    CANCELLING,
    PAGE,
    SUSPENDED_NAMES,
    UNOWNED_FOR,
    hand_over,
    is_left,
    is_running,
    load_flow,
    one_retry_more,
    read_flow_runs,
    read_workers,
    stop_crews_of,
    worker_name,
)
from prefect_crew.runs.keys import forget_calls
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
CANCELLED_UNOWNED_FOR = 10.0
"""The same as `UNOWNED_FOR` for a flow run that is Cancelling, also if its worker is gone: a living worker cancels it
earlier."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30 s. The worker waits for kickoffs in
flight. Then the process ends, and another worker takes over the flow runs that were not given back."""
CLAIMS_AT_ONCE = 20
"""The most flow runs that are claimed at the same time, and read again by one request."""
CANCELLED_AT_ONCE = 10
"""The most flow runs that are ended as Cancelled at the same time: of this worker, and as many of no worker."""


class CrewJobConfiguration(BaseJobConfiguration):
    """A deployment can set nothing for a crew worker, since flow runs share the worker's process and environment."""

    without_effect: list[str] = Field(default=[], description="The job variables that somebody has set.")
    entrypoint: str | None = Field(default=None, description="The import path of the deployment's flow.")
    flow_run_id: UUID | None = Field(default=None, description="The flow run of this configuration.")

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
    """The outcome of a flow run on this worker. `status_code` stands for the exit code of a process of its own."""


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
        self._left_since: dict[UUID, float] = {}  # by the id of their states
        self._cancelling_since: dict[UUID, float] = {}
        self._ending_cancelled = asyncio.Semaphore(CANCELLED_AT_ONCE)
        self._ending_left = asyncio.Semaphore(CANCELLED_AT_ONCE)  # for flow runs that `_watch_pool` waits for

    @property
    def identity(self) -> str:
        """The owner in its flow runs: the worker's name, which has no slash, and the number of this start."""
        return f"{self.name}/{self.boot}"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return a template without variables, as there are none. The server refuses an empty configuration."""
        return {"job_configuration": {"name": None}, "variables": {"type": "object", "properties": {}}}

    # Start and end

    async def setup(self) -> None:
        """Prepare the shared client and event loop, and start the watch of the pool."""
        check_prefect()
        await super().setup()
        client: Any = self.client
        client.read_deployment, client.read_flow = shared(client.read_deployment), shared(client.read_flow)
        of_flow_runs = await self._exit_stack.enter_async_context(AsyncClientContext.get_or_create())
        queue_requests(client, of_flow_runs.client)
        self._exit_stack.enter_context(many_flow_runs(self._logger.warning))
        self._exit_stack.push_async_callback(cancel_and_wait, asyncio.create_task(self._watch_pool()))
        self._exit_stack.push_async_exit(self._leave)  # pushed last: it runs first, and waits for the flow runs

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Run until a signal. The first SIGTERM or SIGINT gives the worker's flow runs back, the second kills it."""
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
                printer(f"Worker {self.name!r} leaves {len(self._held)} flow runs that did not end.")
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
            with contextlib.suppress(*PREFECT_ERRORS):  # an API key may forbid it, and Prefect would end the worker
                await self.client.update_work_pool(pool.name, WorkPoolUpdate(description=POOL_DESCRIPTION))

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        return [] if self._leave_until is not None else await super()._get_scheduled_flow_runs()

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Run a flow run: a scheduled one, or a Running one that this worker has taken over.

        This replaces Prefect's method, which reads the deployment twice, and writes the owner twice, and only after it
        has read deployment and flow. In Prefect's method, a server that cannot be reached would end the worker.
        """
        try:
            try:
                configuration = await self._begin(flow_run)
                submitted = None if configuration is None else self._emit_flow_run_submitted_event(configuration)
            finally:
                # Not later: the flow run may come back, suspended and resumed, while its first coroutine still ends.
                self._end_submitting(flow_run.id)
            if configuration is not None:
                result = await self.run(flow_run, configuration)
                self._emit_flow_run_executed_event(result, configuration, submitted)
        except (Abort, Pause) as signal_of_prefect:  # no subclasses of Exception: they would end the worker
            self._logger.info("Flow run %r ended on this worker: %s", flow_run.name, signal_of_prefect)
        except Exception:
            self._logger.exception("The end of flow run %r could not be written.", flow_run.name)
        finally:
            self._release_limit_slot(flow_run.id)

    async def _begin(self, flow_run: FlowRun) -> CrewJobConfiguration | None:
        """Make this worker the owner of a flow run, if it is not yet. Return None if the flow run cannot begin here."""
        try:
            if not is_running(flow_run):
                if not await self._propose_pending_state(flow_run):
                    return None
                await self.client.update_flow_run(flow_run.id, infrastructure_pid=self.identity)
            try:
                deployment = flow_run.deployment_id and await self.client.read_deployment(flow_run.deployment_id)
            except ObjectNotFound:
                with contextlib.suppress(ObjectNotFound):  # the flow run may be gone as well
                    await self._end_cancelled(flow_run, "The deployment of the flow run was deleted.")
                return None
            return await CrewJobConfiguration.resolve_for_flow_run(
                flow_run,
                client=self.client,
                work_pool=self.work_pool,
                worker_name=self.name,
                worker_id=self.backend_id,
                deployment=deployment or None,
            )
        except Exception as error:
            self._logger.exception("Flow run %r could not be begun.", flow_run.name)
            await self._end_crashed(flow_run, error)
        return None

    def _end_submitting(self, flow_run_id: UUID) -> None:
        self._submitting_flow_run_ids.discard(flow_run_id)
        if self._cancelling_observer is not None:
            self._cancelling_observer.remove_in_flight_flow_run_id(flow_run_id)

    async def _end_crashed(self, flow_run: FlowRun, error: Exception) -> None:
        """End a flow run as Crashed, unless the Prefect server cannot be reached. Then a worker takes it over later."""
        if is_away(error):
            self._logger.warning("The Prefect server does not answer (%s): flow run %r waits.", error, flow_run.name)
            return
        await self._propose_crashed_state(flow_run, f"The worker could not run it: {type(error).__name__}: {error}")

    # One flow run

    async def run(
        self,
        flow_run: FlowRun,
        configuration: CrewJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> CrewWorkerResult:
        """Run a flow run to its end. The outcome is the flow run's state on the server."""
        if (before := self._held.get(flow_run.id)) is not None and before.task is not None:
            before.end("lost", "Another worker had taken the flow run, which came back.")
            await asyncio.wait({before.task})
        forget_calls(str(flow_run.id))
        held = self._held[flow_run.id] = HeldFlowRun(flow_run, self._confirm, self._work_pool_name, self.name)
        try:
            if task_status is not None:
                task_status.started(self.identity)
            held.task = asyncio.create_task(self._execute(held, configuration), name=f"Flow run {flow_run.name!r}")
            await asyncio.wait({held.task})
            if held.ending == "handed over":
                await hand_over(self.client, flow_run.id, held.reason)
            elif held.ending == "cancelled":
                # Read again: the pool hands out a first attempt without the start time, since which its crews run.
                await self._end_cancelled(await self.client.read_flow_run(flow_run.id), held.reason)
            elif held.ending == "suspended":
                await self._leave_suspended(flow_run.id)
        finally:
            if self._held.get(flow_run.id) is held:
                del self._held[flow_run.id]
        has_crashed = held.ending is None and (held.task.cancelled() or held.task.result())
        return CrewWorkerResult(identifier=self.identity, status_code=int(has_crashed))

    async def _execute(self, held: HeldFlowRun, configuration: CrewJobConfiguration) -> bool:
        """Run the flow, and return whether it has crashed. Errors of the flow do not leave this method."""
        flow_run = held.flow_run
        held_flow_run.set(held)  # for the tasks and threads that the flow may leave
        log = flow_run_logger(flow_run)
        if configuration.without_effect:
            log.warning(
                "The job variables %s have no effect, since flow runs share the process of the crew worker. Set "
                "environment variables where the worker starts.",
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
            log.info("The flow run ended on this worker, because Prefect refused or paused it: %s", signal_of_prefect)
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            kind = type(error).__name__
            log.warning("The flow raised %s. Only this flow run ends: the crew worker continues.", kind)
            return True
        except Exception as error:
            log.exception("The flow run could not be run.")
            await self._end_crashed(flow_run, error)
            return True
        return False

    async def _run_flow(self, flow: Flow[Any, Any], held: HeldFlowRun) -> State[Any]:
        """Run a flow run. If the Prefect server could not be reached before the flow began, start again."""
        while True:
            try:
                return await run_held_flow(flow, held)
            except HTTP_ERRORS as error:
                if held.has_begun or not is_away(error):
                    raise
                self._logger.warning(
                    "The Prefect server does not answer (%s): flow run %r waits.", error, held.flow_run.name
                )
                await asyncio.sleep(AWAY_PAUSE)

    async def _confirm(self, held: HeldFlowRun, state: State[Any]) -> FlowRun | None:
        """Before a write of a state, end the flow run as lost if another worker has it, or as suspended if it was.

        This reads the flow run in two cases: before a final state, which would replace Suspended, and if other workers
        may consider this worker dead, since it was frozen or cut off.
        """
        if not state.is_final() and not self._may_count_as_gone():
            return None
        current = await self.client.read_flow_run(held.flow_run.id)
        self._end_if_lost(current)
        if current.state_name in SUSPENDED_NAMES:
            held.end("suspended", "Flow run was suspended.")
        return current

    def _may_count_as_gone(self) -> bool:
        return _clock() - self._confirmed_at >= 2 * self.heartbeat_interval_seconds

    def _end_if_lost(self, current: FlowRun) -> None:
        held = self._held.get(current.id)
        if held is None or self._is_own(current.infrastructure_pid):
            return
        self._logger.warning("Flow run %r was taken by another worker and ends here.", current.name)
        held.end("lost", f"Another worker has taken flow run {current.name!r}.")
        if worker_name(current.infrastructure_pid) == self.name:
            # A worker at once takes over flow runs of an earlier start under its name: two living workers with one name
            # would take each other's flow runs for ever.
            name = f"{self.name}-{self.boot}"
            text = "Another worker %r runs, so this one continues as %r. Give each worker of a pool its own name."
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
                raise InfrastructureNotAvailable(
                    f"Worker {name!r} is online and has flow run {flow_run_id}, so this worker does not end the flow "
                    "run."
                )
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
                    await self._take_over_all()
                    heartbeat_due = read_at + self.heartbeat_interval_seconds
                if self._worker_channel is None:
                    await self.sync_with_backend()
                await self._cancel_all(cancelling)
                self._confirmed_at = read_at
            except PREFECT_ERRORS as error:
                self._logger.debug("The Prefect server could not be asked: %s", error)
            except Exception:
                # An error about one flow run must not end the watch for all others.
                self._logger.exception("The search for flow runs that are cancelled or left behind failed.")
            await asyncio.sleep(LOOK_EVERY)

    async def _end_suspended_ones(self) -> None:
        """End the coroutines of flow runs that somebody has suspended; their crews run on."""
        before = dict(self._held)  # a flow run that begins during the request may have been resumed just before
        if not before:
            return
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=SUSPENDED_NAMES))
        flow_run_filter = FlowRunFilter(id=FlowRunFilterId(any_=list(before)), state=state)
        for flow_run in await read_all(self.client.read_flow_runs, flow_run_filter=flow_run_filter):
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

    async def _take_over_all(self) -> None:
        """Take over the flow runs of every worker of the pool that is surely gone."""
        self._workers = await read_workers(self.client, self._work_pool_name)
        if self._work_pool is None or not self._workers.get(self.name, False):
            # This worker's heartbeats did not arrive, perhaps not even the first. The next one may come minutes later:
            # Prefect sends fewer, the longer it cannot reach the server. Without the pool no flow run can begin here.
            await self.sync_with_backend()
        now, before = _clock(), dict(self._held)
        begun = await read_flow_runs(self.client, self._work_pool_name, BEGUN)
        for flow_run in begun:
            if self._held.get(flow_run.id) is before.get(flow_run.id):  # else it has begun here since it was read
                self._end_if_lost(flow_run)  # also while heartbeats arrive: another worker may have the same name
        left = {flow_run.state.id: flow_run for flow_run in begun if flow_run.state and self._is_left(flow_run)}
        since = {state_id: self._left_since.get(state_id, now) for state_id in left}
        sure = [state_id for state_id, at in since.items() if now - at >= self._unsure_for(left[state_id])]
        self._left_since = {state_id: at for state_id, at in since.items() if state_id not in sure}
        problems: list[BaseException] = []
        for start in range(0, len(sure), CLAIMS_AT_ONCE):
            page = [left[state_id] for state_id in sure[start : start + CLAIMS_AT_ONCE]]
            problems += await self._take_over_page(page)
        for problem in problems:  # an error about one flow run must not keep others from being taken over
            raise problem

    def _is_left(self, flow_run: FlowRun) -> bool:
        if flow_run.id in self._held or flow_run.id in self._submitting_flow_run_ids:
            return False
        # Flow runs of an earlier start under this worker's name are left behind too, and so are those of this start
        # that do not run here.
        return is_left(flow_run, {**self._workers, self.name: False})

    def _unsure_for(self, flow_run: FlowRun) -> float:
        """Return the seconds for which a flow run has to look left behind before it is taken over."""
        name = worker_name(flow_run.infrastructure_pid)
        if name is None or (flow_run.state is not None and flow_run.state.is_pending()):
            return UNOWNED_FOR
        # An earlier start under this worker's name has surely ended. Another worker may only seem to be gone, if it
        # could not reach the server. And the state of a flow run that has just ended here may not be written yet.
        is_of_earlier_start = name == self.name and not self._is_own(flow_run.infrastructure_pid)
        return 0.0 if is_of_earlier_start else float(self.heartbeat_interval_seconds)

    async def _take_over_page(self, left: Sequence[FlowRun]) -> list[BaseException]:
        """Take over the flow runs that no other worker claims, and return the errors.

        The worker leaves a flow run alone if somebody changed it after the read. The worker becomes the owner before
        this check, so that an old owner that was only frozen cannot write an end.
        """
        claims = await asyncio.gather(*map(self._claim, left), return_exceptions=True)
        claimed = {flow_run.id: flow_run for flow_run, claim in zip(left, claims, strict=True) if claim is True}
        problems = [claim for claim in claims if isinstance(claim, BaseException)]
        if claimed:
            ids = FlowRunFilter(id=FlowRunFilterId(any_=list(claimed)))
            current = await self.client.read_flow_runs(flow_run_filter=ids, limit=PAGE)
            unchanged = [
                (flow_run, claimed[flow_run.id])
                for flow_run in current
                if flow_run.state_id == claimed[flow_run.id].state_id and self._is_own(flow_run.infrastructure_pid)
            ]
            results = await asyncio.gather(*(self._take_over(*pair) for pair in unchanged), return_exceptions=True)
            problems += [result for result in results if result is not None]
        return problems

    async def _take_over(self, flow_run: FlowRun, before: FlowRun) -> None:
        """Begin a flow run that was left behind, or give it back to the pool. `before` has its earlier owner.

        The way over the pool changes the state three times instead of once. A limit of a deployment, whose slot a flow
        run takes at Pending, or of this worker needs this. And a worker may be for other work queues.
        """
        owner = worker_name(before.infrastructure_pid) or "unknown"
        why = f"Worker {owner!r} is gone. The flow run starts again, and its crew's run is found by its record."
        has_slot = flow_run.state and flow_run.state.state_details.deployment_concurrency_lease_id
        is_of_queue = not self._work_queues or flow_run.work_queue_name in self._work_queues
        if is_running(flow_run) and not has_slot and is_of_queue and self._leave_until is None:
            begun = flow_run.model_copy(update={"empirical_policy": one_retry_more(flow_run)})
            if await self._submit_scheduled_flow_runs([WorkerFlowRunResponse.model_construct(flow_run=begun)]):
                flow_run_logger(flow_run).warning(why)
                return
        try:
            if await hand_over(self.client, flow_run.id, why, only_from=flow_run.state_id):
                self._logger.warning("Flow run %r goes back to the pool: worker %r is gone.", flow_run.name, owner)
        except ObjectNotFound:
            text = "Flow run %r is not taken over, since it was deleted. Nothing has to be done."
            self._logger.info(text, flow_run.name)
        except (Abort, Pause) as error:
            text = "Flow run %r is not taken over, since it has changed. Nothing has to be done. Prefect's answer: %s"
            self._logger.info(text, flow_run.name, error)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Make this worker the owner of a flow run that was left behind. Return whether it is.

        Of several workers, only one creates the flow run input. A flow run that was deleted has none.
        """
        try:
            if not await self._is_first(flow_run):
                return False
            await self.client.update_flow_run(flow_run.id, infrastructure_pid=self.identity)
        except ObjectNotFound:
            return False
        return True

    async def _is_first(self, flow_run: FlowRun) -> bool:
        for number in range(1, 100):
            key = f"taken-over-{flow_run.state_id}-{number}"
            try:
                await self.client.create_flow_run_input(flow_run.id, key, json.dumps(self.identity))
            except STATUS_ERRORS as error:
                if error.response.status_code == 404:
                    return False  # it was deleted
                if error.response.status_code != 409:
                    raise
            else:
                return True
            claimer = str(json.loads(await self.client.read_flow_run_input(flow_run.id, key)))
            if claimer == self.identity:
                return True  # an earlier try of this worker, which failed later
            name = claimer.rpartition("/")[0]
            if name != self.name and not self._workers.get(name, False):
                self._workers = await read_workers(self.client, self._work_pool_name)  # it may have come online since
            if name != self.name and self._workers.get(name, False):
                return False  # the other worker is alive, and takes the flow run over
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
        if waited < CANCELLED_UNOWNED_FOR or not self._is_left(flow_run):
            return
        self._workers = await read_workers(self.client, self._work_pool_name)  # its worker may have started since
        if (
            self._is_left(flow_run)
            and await self._claim(flow_run)
            and (await self.client.read_flow_run(flow_run.id)).state_id == flow_run.state_id
        ):
            text = "No worker has flow run %r: this worker stops the flow run's crews and cancels it."
            self._logger.warning(text, flow_run.name)
            await self._end_cancelled(flow_run, "Flow run was cancelled while no worker had it.", self._ending_left)

    async def _leave_suspended(self, flow_run_id: UUID) -> None:
        """Make the pool hand out a suspended flow run after it is resumed, also if its last attempt was a retry."""
        policy = (await self.client.read_flow_run(flow_run_id)).empirical_policy
        if policy.retry_type == "in_process":
            policy = policy.model_copy(update={"retry_type": "reschedule"})
            await self.client.update_flow_run(flow_run_id, empirical_policy=policy)

    async def _end_cancelled(self, flow_run: FlowRun, why: str, places: asyncio.Semaphore | None = None) -> None:
        """End a flow run as Cancelled.

        Its own coroutine stops the crew that it waits for. This stops the crews that an earlier attempt started, if the
        coroutine did not reach their waits, or does not exist.
        """
        async with places or self._ending_cancelled:
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
    """Return the seconds of a clock that also runs while the machine sleeps; without one, of the monotonic clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
