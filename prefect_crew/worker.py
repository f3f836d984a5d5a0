"""The crew worker: it runs flow runs as coroutines of one process, and takes over the flow runs of a dead worker.

The main thread has Prefect's worker: its polls, heartbeats and signals, and the watch of the pool. A second thread has
the event loop of all flow runs, so that a flow that blocks its loop stops no heartbeat, and Prefect's flow engine sets
no signal handler.

The crew database says which worker holds a flow run, from before it is Pending until it has ended or is the pool's
again. A worker gives the flow runs that it holds and does not run, of a dead worker or of its own, back to the pool.
The flow runs again from the top, and finds its crew's run in the crew database.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar, cast
from uuid import UUID, uuid4

import anyio.abc
from anyio import CancelScope
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import AsyncClientContext
from prefect.exceptions import Abort, InfrastructureNotFound, ObjectNotFound, Pause
from prefect.flow_engine import AsyncFlowRunEngine
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.settings import (
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_WORKER_ENABLE_CANCELLATION,
    temporary_settings,
)
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Failed, Pending
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult
from pydantic import Field

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import HeldFlowRun, held_flow_run, read_all
from prefect_crew._internal.prefect_errors import HTTP_ERRORS, PREFECT_ERRORS, STATUS_ERRORS, is_away
from prefect_crew.blocks import find_crew
from prefect_crew.exceptions import ConfigurationError, CrewError, StoreError
from prefect_crew.runs.database import in_store, open_store
from prefect_crew.runs.keys import forget_calls
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import cancel_command, open_runs_of, stop_run
from prefect_crew.settings import CrewSettings, documentation_url
from prefect_crew.store import workers
from prefect_crew.store.decision import Attempt

T = TypeVar("T")
LOOK_EVERY = 2.0
"""Seconds between two looks at the flow runs of the pool."""
AGAIN_AFTER = 5.0
"""Seconds between two tries to give a flow run back."""
HAND_OVER_WITHIN = 25.0
"""Seconds for giving flow runs back on a shutdown: Kubernetes kills after 30 s. The worker waits for kickoffs in
flight. Then the process ends, and another worker takes over the flow runs that were not given back."""
EXIT_WITHIN = 5.0
"""Seconds from then on for Prefect's own end. A thread of a flow must not hold the process."""
RETRIES = 8
"""Tries of a request of a flow run: about 8 minutes, in which the Prefect server may be away."""
AT_ONCE = 10
"""The most flow runs that are given back, and the most `/stop` requests for a flow run, at the same time."""
BLOCKED_AFTER = 5.0
"""Seconds that one step of a coroutine may take before a warning names its flow run."""
CANCELLING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
SUSPENDED = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended", "Resuming"]))
"""States in which the coroutine of a flow run has to end: somebody suspended the flow run, and may have resumed it
since. A Paused flow run waits in its coroutine, for a form or for the end of `pause_flow_run`."""
PRIVATE = (
    "_submit_run",
    "_submitting_flow_run_ids",
    "_release_limit_slot",
    "_emit_flow_run_submitted_event",
    "_emit_flow_run_executed_event",
)
"""Names of Prefect's worker that are not public. Its own `_submit_run` ends a flow run as Crashed if the Prefect server
is busy or away, and writes who has it too late. The four others are what it does besides: which flow runs are here,
the limit of the worker, and two events."""


class CrewJobConfiguration(BaseJobConfiguration):
    """A deployment can set nothing for a crew worker, since flow runs share the worker's process and environment."""

    without_effect: list[str] = Field(default=[], description="The job variables that somebody has set.")
    entrypoint: str | None = Field(default=None, description="The import path of the deployment's flow.")
    flow_run_id: UUID | None = Field(default=None, description="The flow run of this configuration.")

    def prepare_for_flow_run(self, flow_run: FlowRun, deployment: Any = None, *args: Any, **options: Any) -> None:
        """Keep the facts for `run`."""
        super().prepare_for_flow_run(flow_run, deployment, *args, **options)
        self.entrypoint, self.flow_run_id = deployment and deployment.entrypoint, flow_run.id
        variables: dict[str, Any] = (deployment and deployment.job_variables) or {}
        self.without_effect = sorted({**variables, **(flow_run.job_variables or {})})


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
    _description = (
        "Runs flows of prefect-crew, and asynchronous flows of your own, as coroutines of a few small processes. A "
        "flow run that waits for a crew holds no process. Start a worker: prefect worker start --pool NAME. "
        "Documentation: prefect-crew docs guides/crew-worker."
    )
    _display_name = "Crew"
    _documentation_url = documentation_url()
    _logo_url = "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/webhook.png"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if missing := [name for name in PRIVATE if not hasattr(self, name)]:
            raise ConfigurationError(
                f"The crew worker needs names of Prefect that this version lacks: {', '.join(missing)}. No flow run "
                "was begun. It is tested with Prefect 3.8.6 to 3.9.1: install one of these."
            )
        self.boot: str = uuid4().hex[:12]
        self._held: dict[UUID, HeldFlowRun] = {}
        self._going_back: set[UUID] = set()
        self._leave_until: float | None = None
        self._at_once = asyncio.Semaphore(AT_ONCE)

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
        """Open the crew database, start the event loop of the flow runs, and begin to watch the pool."""
        with contextlib.suppress(*HTTP_ERRORS):  # the server may come later
            await open_store()
        await super().setup()
        self._flows = FlowLoop()
        await self._flows.start()
        with contextlib.suppress(StoreError, *PREFECT_ERRORS):
            await self._beat()
        watches = {
            self._beat: self.heartbeat_interval_seconds / 2,
            self._look: LOOK_EVERY,
            self._give_all_back: LOOK_EVERY,
        }
        self._watches = [asyncio.create_task(self._repeat(work, pause)) for work, pause in watches.items()]

    async def teardown(self, *exc_info: Any) -> None:
        """Wait for the flow runs, as after `--run-once`. If the worker ends with an error, give them back."""
        if exc_info and exc_info[0] is not None:
            await self.hand_over_all(f"Worker {self.name!r} ended.")
        while self._is_busy and self._leave_until is None:  # noqa: ASYNC110 - Prefect's part of it has no event
            await asyncio.sleep(0.1)
        await cancel_and_wait(*self._watches)
        with contextlib.suppress(StoreError, *PREFECT_ERRORS):  # others may take over at once what it still holds
            await in_store(workers.retire, self.boot)
        await super().teardown(*exc_info)
        await self._flows.stop()

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Run until a signal. The first SIGTERM or SIGINT gives the worker's flow runs back, the second kills it."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        shutdown: list[asyncio.Task[None]] = []

        async def shut_down() -> None:
            await self.hand_over_all(f"Worker {self.name!r} shuts down.")
            if self._held:
                printer(f"Worker {self.name!r} leaves {len(self._held)} flow runs that did not end.")
            end = threading.Timer(EXIT_WITHIN, os._exit, [1])
            end.daemon = True
            end.start()
            if main is not None:
                main.cancel()

        def on_signal() -> None:
            if shutdown:
                os.kill(os.getpid(), signal.SIGKILL)
            printer(f"Worker {self.name!r} shuts down: {len(self._held)} flow runs go back to the pool, crews run on.")
            shutdown.append(loop.create_task(shut_down()))

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # on Windows, or in another thread
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, on_signal)
        with temporary_settings({PREFECT_WORKER_ENABLE_CANCELLATION: False}):  # `_look` does it
            await super().start(run_once=run_once, with_healthcheck=with_healthcheck, printer=printer)

    async def hand_over_all(self, why: str) -> None:
        """Take no new flow runs, and give all flow runs that run here, or are about to, back to the pool."""
        if self._leave_until is None:
            self._leave_until = time.monotonic() + HAND_OVER_WITHIN
        while self._is_busy and time.monotonic() < self._leave_until:
            for held in list(self._held.values()):
                held.end("handed over", why)
            await asyncio.sleep(0.1)

    @property
    def _is_busy(self) -> bool:
        return bool(self._submitting_flow_run_ids or self._going_back)

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take the flow runs that are due, unless the worker shuts down."""
        return [] if self._leave_until is not None else await super().get_and_submit_flow_runs()

    # One flow run

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Run a scheduled flow run, in place of Prefect's method.

        `_give_all_back` gives back what is held and does not begin, or whose end could not be written.
        """
        try:
            # An earlier coroutine of it may still end here, or go back: then the pool hands it out again.
            if flow_run.id not in self._going_back and await in_store(workers.hold, str(flow_run.id), self.boot):
                await self._begin(flow_run)
        except (Abort, Pause, ObjectNotFound) as error:
            self._logger.info("Flow run %r does not begin: %s", flow_run.name, error)
        except (StoreError, *PREFECT_ERRORS) as error:
            self._logger.warning("Flow run %r is left to a later look: %s", flow_run.name, error)
        except Exception:
            self._logger.exception("The end of flow run %r could not be written.", flow_run.name)
        finally:
            self._submitting_flow_run_ids.discard(flow_run.id)
            self._release_limit_slot(flow_run.id)

    async def _begin(self, flow_run: FlowRun) -> None:
        state = await propose_state(self.client, Pending(), flow_run_id=flow_run.id)
        if not state.is_pending():
            return
        await self.client.update_flow_run(flow_run.id, infrastructure_pid=self.identity)
        try:
            deployment = flow_run.deployment_id and await self.client.read_deployment(flow_run.deployment_id)
        except ObjectNotFound:
            why = Cancelled(message="The deployment of the flow run was deleted.")
            await self.client.set_flow_run_state(flow_run.id, why, force=True)
            return
        try:
            configuration = await CrewJobConfiguration.resolve_for_flow_run(
                flow_run,
                client=self.client,
                work_pool=self.work_pool,
                worker_name=self.name,
                worker_id=self.backend_id,
                deployment=deployment or None,
            )
        except Exception as error:
            if is_away(error):
                raise
            self._logger.exception("Flow run %r could not be begun.", flow_run.name)
            await propose_state(self.client, _crashed_by(error), flow_run_id=flow_run.id)
            return
        submitted = self._emit_flow_run_submitted_event(configuration)
        result = await self.run(flow_run, configuration)
        self._emit_flow_run_executed_event(result, configuration, submitted)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: CrewJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> CrewWorkerResult:
        """Run a flow run to its end. The outcome is the flow run's state on the server."""
        forget_calls(str(flow_run.id))
        held = self._held[flow_run.id] = HeldFlowRun(flow_run, self._flows.loop)
        try:
            if task_status is not None:
                task_status.started(self.identity)
            state = await self._flows.run(self._execute(held, configuration))
            if state is not None and state.is_final():
                await in_store(workers.release, str(flow_run.id), self.boot)
            else:
                await self._give_back(flow_run.id, held.reason)
        finally:
            del self._held[flow_run.id]
        return CrewWorkerResult(identifier=self.identity, status_code=int(state is not None and state.is_crashed()))

    async def _execute(self, held: HeldFlowRun, configuration: CrewJobConfiguration) -> State[Any] | None:
        """Run the flow, in the event loop of the flow runs. Return its last state, None if the worker has to look."""
        flow_run, log = held.flow_run, flow_run_logger(held.flow_run)
        held.task = asyncio.current_task()
        held_flow_run.set(held)  # for the tasks and threads that the flow may leave
        if configuration.without_effect:
            log.warning(
                "The job variables %s have no effect, since flow runs share the process of the crew worker. Set "
                "environment variables where the worker starts.",
                ", ".join(configuration.without_effect),
            )
        try:
            if held.ending is not None:
                return None
            flow = load_flow(configuration.entrypoint, allowed=CrewSettings().worker_modules)
            state = await _run_flow(flow, held)
            if state.is_cancelling():  # it failed at the moment of its cancellation
                held.end("cancelled", "Flow run was cancelled.")
        except ConfigurationError as error:
            log.error("%s", error)  # noqa: TRY400 - the message needs no traceback
            return await _propose(flow_run, Failed(message=str(error)))
        except (Abort, Pause) as signal_of_prefect:
            log.info("The flow run ended on this worker, because Prefect refused or paused it: %s", signal_of_prefect)
        except Exception as error:
            # HTTP 500 is an answer that a later request gets too: PostgreSQL refuses a message with a NUL character.
            if not is_away(error) or (isinstance(error, STATUS_ERRORS) and error.response.status_code == 500):
                log.exception("The flow run could not be run.")
                return await _propose(flow_run, _crashed_by(error))
            log.warning("The Prefect server does not answer (%s). The flow run begins again later.", error)
        except BaseException as error:  # noqa: BLE001 - it must not end the thread of all flow runs
            if held.ending is None:  # the engine has written it
                log.warning("The flow raised %s. Only this flow run ends.", type(error).__name__)
                return Crashed()
            log.info("The flow run ended on this worker: %s", held.reason)
        else:
            return state
        return None

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
        if not self._has_pool:
            return
        pool, heartbeat = str(self.work_pool.id), self.heartbeat_interval_seconds
        while await in_store(workers.beat, self.boot, pool, self.name, socket.gethostname(), heartbeat):
            name = f"{self.name}-{self.boot}"
            text = "Another worker %r runs here, so this one continues as %r. Give each worker of a pool its own name."
            self._logger.warning(text, self.name, name)
            self.name = name
        if self._leave_until is None and (taken := await in_store(workers.take_over, self.boot, heartbeat)):
            self._logger.warning("%d flow runs go back to the pool: their worker is gone.", taken)

    @property
    def _has_pool(self) -> bool:
        """Whether the worker has reached the Prefect server."""
        return self.get_status()["work_pool"] is not None

    async def _look(self) -> None:
        """End the coroutines of flow runs that another worker has taken, or that somebody has cancelled or suspended.
        Hold the cancelled ones that nobody holds."""
        self._flows.warn_if_blocked(self._logger.warning)
        before = dict(self._held)
        own = {UUID(flow_run_id) for flow_run_id in await in_store(workers.held_by, self.boot)}
        for held in [before[flow_run_id] for flow_run_id in before.keys() - own]:
            if held.task is None or not held.task.done():
                self._logger.warning("Flow run %r was taken by another worker and ends here.", held.flow_run.name)
                held.end("lost", f"Another worker has taken flow run {held.flow_run.name!r}.")
        if before:  # not those that begin during the request: they may have been resumed just before
            of_these = FlowRunFilter(id=FlowRunFilterId(any_=list(before)), state=SUSPENDED)
            for flow_run in await read_all(self.client.read_flow_runs, flow_run_filter=of_these):
                before[flow_run.id].end("suspended", "It is suspended. Its crews run on.")
        if not self._has_pool:
            return
        of_pool = WorkPoolFilter(id=WorkPoolFilterId(any_=[self.work_pool.id]))
        cancelling = FlowRunFilter(state=CANCELLING)
        read = self.client.read_flow_runs
        for flow_run in await read_all(read, flow_run_filter=cancelling, work_pool_filter=of_pool):
            if (held := self._held.get(flow_run.id)) is not None:
                held.end("cancelled", "Flow run was cancelled.")
            else:
                await in_store(workers.hold, str(flow_run.id), self.boot)

    async def _give_all_back(self) -> None:
        """Give back the flow runs that this worker holds and does not run."""
        held = {UUID(flow_run_id) for flow_run_id in await in_store(workers.held_by, self.boot)}
        self._going_back = held - self._submitting_flow_run_ids - self._held.keys()
        await asyncio.gather(*map(self._give_one_back, self._going_back))
        self._going_back = set()

    async def _give_one_back(self, flow_run_id: UUID) -> None:
        try:
            await self._give_back(flow_run_id, "Its worker is gone. It starts again, and finds the runs of its crews.")
        except (StoreError, Abort, Pause, *PREFECT_ERRORS) as error:
            self._logger.info("Flow run %s is given back a little later: %s", flow_run_id, error)
            await asyncio.sleep(AGAIN_AFTER)
        except Exception:
            self._logger.exception("Flow run %s could not be given back.", flow_run_id)
            await asyncio.sleep(AGAIN_AFTER)

    async def _give_back(self, flow_run_id: UUID, why: str) -> None:
        """Bring a flow run that does not run here any more into a state in which nobody holds it."""
        async with self._at_once:
            if await in_store(workers.holder, str(flow_run_id)) != self.boot:
                return
            with contextlib.suppress(ObjectNotFound):  # it was deleted
                flow_run = await self.client.read_flow_run(flow_run_id)
                state = flow_run.state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    # Its coroutine has stopped the crew that it waited for, if it exists and has reached the wait.
                    await stop_crews_of(self.client, flow_run)
                    if state.is_cancelling():
                        ended = Cancelled(message="Flow run was cancelled.")
                        await self.client.set_flow_run_state(flow_run_id, ended, force=True)
                else:
                    await hand_over(self.client, flow_run, why)
            await in_store(workers.release, str(flow_run_id), self.boot)


# Flow runs in their thread


class FlowLoop:
    """The event loop of all flow runs, in a thread of its own: without heartbeats, which would take a thread for each
    flow run, with patient requests, and with one client of Prefect for all."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._ready: Future[contextvars.Context] = Future()
        self._end = asyncio.Event()
        self._beat, self._warned = time.monotonic(), 0.0
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._serve], name="flow runs", daemon=True)

    async def start(self) -> None:
        """Start the thread, and wait until flow runs can begin."""
        self._thread.start()
        self._main = asyncio.run_coroutine_threadsafe(self._live(), self.loop)
        self._context = await asyncio.wrap_future(self._ready)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine that runs in this loop."""
        submit = asyncio.run_coroutine_threadsafe
        return await asyncio.wrap_future(self._context.run(submit, coroutine, self.loop))

    async def stop(self) -> None:
        """Stop the loop. Coroutines that have not ended stay where they are."""
        self.loop.call_soon_threadsafe(self._end.set)
        await asyncio.wait([asyncio.wrap_future(self._main)], timeout=1)
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _serve(self) -> None:
        while not self._end.is_set():
            # A SystemExit in a task of a flow passes through the loop, and then reaches whoever awaits the task.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()
        self.loop.close()

    async def _live(self) -> None:
        settings: dict[Any, Any] = {
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
            PREFECT_CLIENT_MAX_RETRIES: max(RETRIES, PREFECT_CLIENT_MAX_RETRIES.value()),
            PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,  # the server may come later
        }
        with temporary_settings(settings):
            async with AsyncClientContext.get_or_create():
                self._ready.set_result(contextvars.copy_context())
                while not self._end.is_set():
                    self._beat = time.monotonic()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._end.wait(), 1.0)

    def warn_if_blocked(self, warn: Callable[..., None]) -> None:
        """Name the flow run that blocks the loop, since no other flow run then goes on."""
        beat, seconds = self._beat, time.monotonic() - self._beat
        if seconds < BLOCKED_AFTER or self._warned == beat:
            return
        self._warned = beat
        task = asyncio.current_task(self.loop)
        frame = sys._current_frames().get(self._thread.ident or 0)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - documented, for this
        warn(
            "%s has blocked the event loop for %.0f s, at %s, so all other flow runs wait. Run such work in "
            "`await asyncio.to_thread(…)`, or deploy the flow to a process work pool.",
            "Something" if task is None else task.get_name(),
            seconds,
            frame and f"{frame.f_code.co_filename}:{frame.f_lineno}",
        )


class _Engine(AsyncFlowRunEngine[Any, Any]):
    held: HeldFlowRun

    async def handle_crash(self, exc: BaseException) -> None:
        """A coroutine that the worker ends has not crashed. The worker writes its state."""
        self.held.is_out = True
        has_slot = self.state.state_details.deployment_concurrency_lease_id is not None
        if has_slot and isinstance(exc, asyncio.CancelledError):
            # Prefect cancels a flow run that has lost its slot, as each one has that is paused for four minutes.
            self.held.end("handed over", "It lost its slot in the deployment's concurrency limit, and begins again.")
        if self.held.ending is None:
            await super().handle_crash(exc)
        elif self.held.was_cancelled and self.flow_run is not None:
            self.flow_run.state = Cancelling(message=self.held.reason)
            token = held_flow_run.set(None)  # a hook may start a crew
            try:
                with CancelScope(shield=True):
                    await self.call_hooks(self.flow_run.state)
            finally:
                held_flow_run.reset(token)


class _TaskRunner(ThreadPoolTaskRunner[Any]):
    """Waits for its threads in another thread: a wait would block the loop of all flow runs."""

    def __exit__(self, *error: Any) -> None:
        thread = threading.Thread(target=super().__exit__, args=error, name="end of tasks", daemon=True)
        thread.start()
        if (held := held_flow_run.get()) is not None:
            held.threads.append(thread)


async def _run_flow(flow: Flow[..., Any], held: HeldFlowRun) -> State[Any]:
    """Run the flow of a flow run, like `prefect.flow_engine.run_flow_async`, and return its last state."""
    if isinstance(flow.task_runner, ThreadPoolTaskRunner):
        runner: Any = flow.task_runner.duplicate()
        runner.__class__ = _TaskRunner  # with its number of threads
        flow = flow.with_options(task_runner=runner)
    # Without its deployment the engine watches for no suspension, which takes a thread with a loop and a subscription.
    # It reads the flow run again before the flow begins, with its deployment.
    flow_run = held.flow_run.model_copy(update={"deployment_id": None})
    engine = _Engine(flow=flow, flow_run=flow_run, parameters=flow_run.parameters)
    engine.held = held
    async with engine.start():
        while engine.is_running():
            async with engine.run_context():
                await engine.call_flow_fn()
            # As in Prefect, before a retry or the end.
            while any(thread.is_alive() for thread in held.threads):  # noqa: ASYNC110 - threads have no event
                await asyncio.sleep(0.2)
    return engine.state


async def _propose(flow_run: FlowRun, state: State[Any]) -> State[Any] | None:
    """Propose a state, and return what the server made of it, None if it refused."""
    with contextlib.suppress(Abort, ObjectNotFound):
        async with AsyncClientContext.get_or_create() as context:
            return await propose_state(context.client, state, flow_run_id=flow_run.id)
    return None


def _crashed_by(error: Exception) -> State[Any]:
    return Crashed(message=f"The worker could not run it: {type(error).__name__}: {error}")


def load_flow(entrypoint: str | None, *, allowed: Iterable[str]) -> Flow[..., Any]:
    """Import an asynchronous flow by its path, such as `my_package.flows.my_flow`.

    `allowed` are the allowed modules in addition to this package's, each with its submodules.

    Raises:
        ConfigurationError: The path is no import path, is not allowed, cannot be imported, or is no asynchronous flow.
    """
    module, _, name = (entrypoint or "").rpartition(".")
    if not module or not {":", "/"}.isdisjoint(entrypoint or ""):
        raise ConfigurationError(
            f"{entrypoint!r} is not an import path of a flow, such as my_package.flows.my_flow. Deploy a flow in a "
            "file to a process work pool with prefect deploy."
        )
    permitted = ["prefect_crew", *allowed]
    if not any(module == package or module.startswith(f"{package}.") for package in permitted):
        raise ConfigurationError(
            f"This crew worker is not allowed to import {module}. Add it to PREFECT_INTEGRATIONS_CREW_WORKER_MODULES "
            f"where the worker starts. Allowed: {', '.join(permitted)}."
        )
    try:
        flow = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        reason = f"{error}" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigurationError(
            f"The flow {entrypoint} cannot be imported ({reason}). Install its package here and where the worker runs."
        ) from error
    if not isinstance(flow, Flow):
        raise ConfigurationError(f"{entrypoint} is not a flow. Decorate the function with @flow.")
    if flow.isgenerator or not flow.isasync:
        kind = "a generator" if flow.isgenerator else "synchronous"
        raise ConfigurationError(
            f"The flow {entrypoint} is {kind}, but a crew worker only runs asynchronous flows that return. Write it as "
            "`async def`, or deploy it to a process work pool with prefect deploy."
        )
    return cast("Flow[..., Any]", flow)


# Flow runs that do not run here


async def hand_over(client: PrefectClient, flow_run: FlowRun, why: str) -> None:
    """Give a flow run that has not ended back to its pool, which hands it out again. `why` is its state's message.

    One that is scheduled or suspended keeps its state. The policy changes first: a pool hands out no flow run that
    waits for a retry "in process", and the server counts a change of workers as a failed attempt.
    """
    state, policy = flow_run.state, flow_run.empirical_policy
    if state is None or state.is_final():
        return
    update: dict[str, Any] = {"retry_type": "reschedule"}
    if state.is_scheduled() or (state.is_paused() and state.state_details.pause_reschedule):
        if policy.retry_type == "in_process":
            await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update=update))
        return
    update["retries"] = policy.retries and policy.retries + 1
    if state.is_paused():
        # So that the next start pauses again. Prefect's server does this from 3.9 on.
        update["pause_keys"] = (policy.pause_keys or set()) - {state.state_details.pause_key}
        keyset = state.state_details.run_input_keyset or {}
        for part in keyset.keys() & {"schema", "description"}:
            with contextlib.suppress(*STATUS_ERRORS, ObjectNotFound):  # there is none
                await client.delete_flow_run_input(flow_run.id, keyset[part])
    await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update=update))
    await propose_state(client, AwaitingRetry(message=why), flow_run_id=flow_run.id)


async def stop_crews_of(client: PrefectClient, flow_run: FlowRun) -> None:
    """Stop the crews whose runs a flow run or its subflows started. A second call sends no second `/stop`.

    The flow run of a batch stops the runs of its rows itself; `prefect-crew batch cancel` stops them too.
    """
    log, limit = flow_run_logger(flow_run), asyncio.Semaphore(AT_ONCE)

    async def stop(attempt: Attempt) -> None:
        if attempt.first_id is None:
            log.warning(
                "The kickoff of run %r is uncertain. If it started a run, the run continues at %s. Look at the crew's "
                "page, then run: prefect-crew runs resolve %s --kickoff-id ID, or --never-started.",
                *(attempt.key, attempt.crew_url, shlex.quote(attempt.key)),
            )
            return
        try:
            crew = await find_crew(attempt)
            if crew is None:
                raise ConfigurationError(f"no block {attempt.crew!r} has its address")
            async with limit:
                # A wait of the flow run that has survived it may stop the crew at the same moment.
                answer = await stop_run(LiveRun(crew, attempt.first_id, attempt), is_repeated=False)
            text = "Crew run %s was asked to stop. The answer of the crew's server: %s."
            log.info(text, attempt.first_id, answer.outcome)
        except (CrewError, *PREFECT_ERRORS) as error:
            text = "Crew run %s could not be stopped (%s): it continues at %s. To stop the crew, run: %s"
            log.warning(text, attempt.first_id, error, attempt.crew_url, cancel_command(attempt))

    open_runs = await open_runs_of(client, flow_run)
    await asyncio.gather(*(stop(attempt) for attempt in open_runs if attempt.stop_asked_at is None))
