"""The crew worker: it runs flow runs as coroutines of one process, and takes over the flow runs of a dead worker.

The crew database says which worker holds a flow run, from before it is Pending until it has ended or is the pool's
again. A worker gives the flow runs that it holds and does not run, of a dead worker or of its own, back to the pool.
The flow runs again from the top, and finds its crew's run in the crew database.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio.abc
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.context import AsyncClientContext
from prefect.events.worker import EventsWorker
from prefect.exceptions import Abort, InfrastructureNotFound, ObjectNotFound, Pause
from prefect.flows import Flow
from prefect.logging.handlers import APILogWorker
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled, Crashed, Failed, Pending
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
from prefect_crew._internal.prefect_errors import HTTP_ERRORS, PREFECT_ERRORS, is_away
from prefect_crew.exceptions import ConfigurationError, StoreError
from prefect_crew.pool import end_cancelled, hand_over, load_flow, stop_crews_of
from prefect_crew.runs.database import in_store, open_store
from prefect_crew.runs.keys import forget_calls
from prefect_crew.settings import CrewSettings, documentation_url
from prefect_crew.store import workers

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse


POOL_DESCRIPTION = (
    "Runs flows of prefect-crew, and asynchronous flows of your own, as coroutines of a few small processes. A flow "
    "run that waits for a crew holds no process. Start a worker: prefect worker start --pool NAME. "
    "Documentation: prefect-crew docs guides/crew-worker."
)
LOOK_EVERY = 2.0
"""Seconds between two looks at the flow runs of the pool."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30 s. The worker waits for kickoffs in
flight. Then the process ends, and another worker takes over the flow runs that were not given back."""
CANCELLED_AT_ONCE = 10
"""The most flow runs that are ended as Cancelled at the same time."""
CANCELLING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
SUSPENDED = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended", "Resuming"]))
"""States in which the coroutine of a flow run has to end: somebody suspended the flow run, and may have resumed it
since. A Paused flow run waits in its coroutine, for a form or for the end of `pause_flow_run`."""


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
        self._going_back: dict[UUID, asyncio.Task[None]] = {}
        self._leave_until: float | None = None
        self._seen_at = float("-inf")
        self._cancelling = asyncio.Semaphore(CANCELLED_AT_ONCE)

    @property
    def identity(self) -> str:
        """The `infrastructure_pid` of its flow runs: for people, and so that the server does not end a flow run that is
        cancelled between two attempts by itself, while its crew runs on."""
        return f"{self.name}/{self.boot}"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return a template without variables, as there are none. The server refuses an empty configuration."""
        return {"job_configuration": {"name": None}, "variables": {"type": "object", "properties": {}}}

    # Start and end

    async def setup(self) -> None:
        """Prepare the shared client and event loop, and start the watch of the pool."""
        check_prefect()
        with contextlib.suppress(*HTTP_ERRORS):  # the server may come later
            await open_store()
        await super().setup()
        client: Any = self.client
        client.read_deployment, client.read_flow = shared(client.read_deployment), shared(client.read_flow)
        of_flow_runs = await self._exit_stack.enter_async_context(AsyncClientContext.get_or_create())
        queue_requests(client, of_flow_runs.client)
        self._exit_stack.enter_context(many_flow_runs(self._logger.warning))
        with contextlib.suppress(StoreError, *PREFECT_ERRORS):
            await self._beat()
        self._exit_stack.push_async_callback(self._retire)
        watches = (self._repeat(self._beat, self.heartbeat_interval_seconds / 2), self._repeat(self._look, LOOK_EVERY))
        self._exit_stack.push_async_callback(cancel_and_wait, *map(asyncio.create_task, watches))
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
                await self._retire()
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
        while self._is_busy and time.monotonic() < self._leave_until:
            for held in list(self._held.values()):
                held.end("handed over", why)
            await asyncio.sleep(0.1)

    async def _leave(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        """Wait for flow runs after `--run-once`; give them back if the worker ends with an error."""
        if error is not None:
            await self.hand_over_all(f"Worker {self.name!r} ended.")
            return
        while self._is_busy:  # noqa: ASYNC110 - Prefect's part of it has no event
            await asyncio.sleep(0.1)

    @property
    def _is_busy(self) -> bool:
        return bool(self._held or self._submitting_flow_run_ids or self._going_back)

    async def _retire(self) -> None:
        """Let others take over at once what this worker still holds."""
        with contextlib.suppress(StoreError, *PREFECT_ERRORS):
            await in_store(workers.retire, self.boot)

    async def sync_with_backend(self) -> None:
        """Send a heartbeat, and give the pool a description if it has none."""
        await super().sync_with_backend()
        pool = self._work_pool
        if pool is not None and pool.description is None:
            pool.description = POOL_DESCRIPTION
            with contextlib.suppress(*PREFECT_ERRORS):  # an API key may forbid it, and Prefect would end the worker
                await self.client.update_work_pool(pool.name, WorkPoolUpdate(description=POOL_DESCRIPTION))

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        # One that cannot say that it lives may take nothing: others would not find out that it has died.
        is_idle = self._leave_until is not None or self._may_count_as_dead()
        return [] if is_idle else await super()._get_scheduled_flow_runs()

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Run a scheduled flow run.

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
        except (StoreError, *PREFECT_ERRORS) as error:
            self._logger.warning("Flow run %r is left to a later look: %s", flow_run.name, error)
        except Exception:
            self._logger.exception("The end of flow run %r could not be written.", flow_run.name)
        finally:
            self._release_limit_slot(flow_run.id)

    async def _begin(self, flow_run: FlowRun) -> CrewJobConfiguration | None:
        """Hold a flow run, and make it Pending. Return None if it cannot begin here.

        `_look` gives back what is held and does not begin. Raises StoreError.
        """
        if flow_run.id in self._held or flow_run.id in self._going_back:
            return None  # an earlier coroutine of it still ends here: the pool hands it out again
        if not await in_store(workers.hold, str(flow_run.id), self.boot):
            return None
        try:
            if not await self._is_pending(flow_run):
                await in_store(workers.release, str(flow_run.id), self.boot)
                return None
            await self.client.update_flow_run(flow_run.id, infrastructure_pid=self.identity)
            try:
                deployment = flow_run.deployment_id and await self.client.read_deployment(flow_run.deployment_id)
            except ObjectNotFound:
                with contextlib.suppress(ObjectNotFound):  # the flow run may be gone as well
                    why = Cancelled(message="The deployment of the flow run was deleted.")
                    await self.client.set_flow_run_state(flow_run.id, why, force=True)
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

    async def _is_pending(self, flow_run: FlowRun) -> bool:
        """Propose that a flow run is Pending, and return whether the server agrees."""
        try:
            state = await propose_state(self.client, Pending(), flow_run_id=flow_run.id)
        except (Abort, ObjectNotFound) as error:
            self._logger.info("Flow run %r does not begin: %s", flow_run.name, error)
            return False
        return state.is_pending()

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
        forget_calls(str(flow_run.id))
        held = self._held[flow_run.id] = HeldFlowRun(flow_run, self._confirm)
        try:
            if task_status is not None:
                task_status.started(self.identity)
            task = asyncio.create_task(self._execute(held, configuration), name=f"Flow run {flow_run.name!r}")
            held.task = task
            await asyncio.wait({task})
            failed = task.cancelled() or task.exception() is not None
            state = None if failed else task.result()
            if state is not None and state.is_final():
                await in_store(workers.release, str(flow_run.id), self.boot)
            elif held.ending != "lost":
                await self._give_back(flow_run.id, held.reason)
        finally:
            del self._held[flow_run.id]
        has_crashed = held.ending is None and (failed or (state is not None and state.is_crashed()))
        return CrewWorkerResult(identifier=self.identity, status_code=int(has_crashed))

    async def _execute(self, held: HeldFlowRun, configuration: CrewJobConfiguration) -> State[Any] | None:
        """Run the flow, and return its last state, None if that is unknown here. Raises what ended it otherwise."""
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
        except ConfigurationError as error:
            log.error("%s", error)  # noqa: TRY400 - the message needs no traceback
            with contextlib.suppress(Abort):
                return await propose_state(self.client, Failed(message=str(error)), flow_run_id=flow_run.id)
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
            return Crashed()  # as the engine has written it
        except Exception as error:
            log.exception("The flow run could not be run.")
            await self._end_crashed(flow_run, error)
            raise
        else:
            return state
        return None

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
        """Before a write of a state, end the flow run as lost if another worker holds it, or as suspended if it was.

        This asks in two cases: before a final state, which would replace Suspended, and if other workers may consider
        this worker dead, since it was frozen or cut off.
        """
        if not state.is_final() and not self._may_count_as_dead():
            return None
        with contextlib.suppress(StoreError):  # nobody can have taken it, then
            if await in_store(workers.holder, str(held.flow_run.id)) != self.boot:
                self._lose(held)
        current = await self.client.read_flow_run(held.flow_run.id)
        if current.state_name in ("Suspended", "Resuming"):
            held.end("suspended", "Flow run was suspended.")
        return current

    def _may_count_as_dead(self) -> bool:
        return _clock() - self._seen_at >= 2 * self.heartbeat_interval_seconds

    def _lose(self, held: HeldFlowRun) -> None:
        if held.task is None or (held.ending != "lost" and not held.task.done()):
            self._logger.warning("Flow run %r was taken by another worker and ends here.", held.flow_run.name)
            held.end("lost", f"Another worker has taken flow run {held.flow_run.name!r}.")

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: CrewJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Stop the crews of a flow run that the Prefect server has ended as Cancelled, because no worker did.

        Raises:
            InfrastructureNotFound: Always, as a flow run has none of its own.
        """
        if configuration.flow_run_id is not None:
            flow_run = await self.client.read_flow_run(configuration.flow_run_id)
            if flow_run.state is not None and flow_run.state.is_cancelled():  # else it may have begun again
                await stop_crews_of(self.client, flow_run)
        raise InfrastructureNotFound(f"No process or container belongs to {infrastructure_pid}.")

    # All flow runs of the pool

    async def _repeat(self, work: Callable[[], Awaitable[None]], pause: float) -> None:
        while True:
            try:
                await work()
            except PREFECT_ERRORS as error:
                self._logger.debug("The Prefect server could not be asked: %s", error)
            except StoreError as error:
                self._logger.warning("%s", error)
            except Exception:
                # An error about one flow run must not end the watch for all others.
                self._logger.exception("The search for flow runs that are cancelled or left behind failed.")
            await asyncio.sleep(pause)

    async def _beat(self) -> None:
        """Say in the crew database that this worker lives, and take over the flow runs of dead ones."""
        if self._work_pool is None:
            await self.sync_with_backend()  # Prefect tries it the more rarely, the longer it could not reach the server
        if self._work_pool is None:
            return
        pool, at, heartbeat = str(self._work_pool.id), _clock(), self.heartbeat_interval_seconds
        while await in_store(workers.beat, self.boot, pool, self.name, socket.gethostname(), heartbeat):
            name = f"{self.name}-{self.boot}"
            text = "Another worker %r runs here, so this one continues as %r. Give each worker of a pool its own name."
            self._logger.warning(text, self.name, name)
            self.name = name
        self._seen_at = at
        if self._leave_until is None and (taken := await in_store(workers.take_over, self.boot, heartbeat)):
            self._logger.warning("%d flow runs go back to the pool: their worker is gone.", taken)

    async def _look(self) -> None:
        """End the coroutines of flow runs that another worker has taken, or that somebody has cancelled or suspended.
        Give back flow runs that this worker holds and does not run."""
        before = dict(self._held)
        own = {UUID(flow_run_id) for flow_run_id in await in_store(workers.held_by, self.boot)}
        for held in [before[flow_run_id] for flow_run_id in before.keys() - own]:
            self._lose(held)
        self._give_back_all(own)
        if before:  # not those that begin during the request: they may have been resumed just before
            of_these = FlowRunFilter(id=FlowRunFilterId(any_=list(before)), state=SUSPENDED)
            for flow_run in await read_all(self.client.read_flow_runs, flow_run_filter=of_these):
                before[flow_run.id].end("suspended", "Flow run was suspended.")
        of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name]))
        cancelling = FlowRunFilter(state=CANCELLING)
        read = self.client.read_flow_runs
        for flow_run in await read_all(read, flow_run_filter=cancelling, work_pool_filter=of_pool):
            if (held := self._held.get(flow_run.id)) is not None:
                held.end("cancelled", "Flow run was cancelled.")
            elif flow_run.id not in self._submitting_flow_run_ids and await in_store(
                workers.hold, str(flow_run.id), self.boot
            ):
                self._give_back_all({flow_run.id})

    def _give_back_all(self, flow_run_ids: set[UUID]) -> None:
        """Begin to give back those of the flow runs, held by this worker, that it does not run."""
        for flow_run_id in flow_run_ids - self._held.keys() - self._submitting_flow_run_ids - self._going_back.keys():
            self._going_back[flow_run_id] = asyncio.create_task(self._give_one_back(flow_run_id))

    async def _give_one_back(self, flow_run_id: UUID) -> None:
        try:
            await self._give_back(flow_run_id, "Its worker is gone. It starts again, and finds the runs of its crews.")
        except (StoreError, Abort, Pause, *PREFECT_ERRORS) as error:
            self._logger.info("Flow run %s is given back a little later: %s", flow_run_id, error)
            await asyncio.sleep(AWAY_PAUSE)
        except Exception:
            self._logger.exception("Flow run %s could not be given back.", flow_run_id)
            await asyncio.sleep(AWAY_PAUSE)
        finally:
            del self._going_back[flow_run_id]

    async def _give_back(self, flow_run_id: UUID, why: str) -> None:
        """Bring a flow run that does not run here any more into a state in which nobody holds it."""
        if await in_store(workers.holder, str(flow_run_id)) != self.boot:
            return
        with contextlib.suppress(ObjectNotFound):  # it was deleted
            flow_run = await self.client.read_flow_run(flow_run_id)
            if flow_run.state is not None and (flow_run.state.is_cancelling() or flow_run.state.is_cancelled()):
                async with self._cancelling:
                    await end_cancelled(self.client, flow_run)
            else:
                await hand_over(self.client, flow_run, why)
        await in_store(workers.release, str(flow_run_id), self.boot)


def _send_logs_and_events() -> None:
    """Send the logs and events in Prefect's queues, as Prefect does at the end of a process."""
    for stream in (APILogWorker, EventsWorker):
        stream.drain_all(timeout=2)
    for output in (sys.stdout, sys.stderr):
        output.flush()


def _clock() -> float:
    """Return the seconds of a clock that also runs while the machine sleeps; without one, of the monotonic clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
