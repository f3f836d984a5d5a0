"""Prefect's flow engine and the event loop, changed so that the crew worker can run many flow runs in one process.

Private API of Prefect: NAMES lists it, with the versions that have it. To ask for upstream: an engine that takes the
reason of a cancellation as an argument, and that leaves signals, heartbeats and the watch for suspensions to the
process that runs many flow runs.
"""

from __future__ import annotations

import asyncio
import importlib
import operator
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, ParamSpec, TypeVar, cast
from uuid import UUID

import prefect
import prefect.flow_engine
import prefect.results
from anyio import CancelScope
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import AsyncClientContext, FlowRunContext
from prefect.flow_engine import AsyncFlowRunEngine
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_crew._internal.asyncio_tasks import loop_runs
from prefect_crew._internal.prefect_api import held_flow_run
from prefect_crew._internal.prefect_errors import HTTP_ERRORS, STATUS_ERRORS, is_transient
from prefect_crew._text import version_numbers
from prefect_crew.exceptions import ConfigurationError, InvalidCallError

P = ParamSpec("P")
T = TypeVar("T")
TESTED = ("3.8.6", "3.9.1")
"""The oldest and the newest Prefect with which the crew worker is tested."""
NAMES: Mapping[str, str | None] = {
    "prefect.flow_engine:capture_sigterm": None,
    "prefect.flow_engine:_send_heartbeats": None,
    # From 3.9.4 on it begins before the flow is loaded, in a process that the worker does not start.
    "prefect.flow_engine:observe_flow_run_suspension": "3.9.4",
    "prefect.flow_engine:amaintain_concurrency_lease": None,
    "prefect.results:_read_server_default_result_storage_block_id": None,
    "prefect.results:_aread_server_default_result_storage_block_id": None,
    "prefect.task_runners:ThreadPoolTaskRunner.cancel_all": None,
    "prefect.flow_engine:AsyncFlowRunEngine.start": None,
    "prefect.flow_engine:AsyncFlowRunEngine.is_running": None,
    "prefect.flow_engine:AsyncFlowRunEngine.run_context": None,
    "prefect.flow_engine:AsyncFlowRunEngine.call_flow_fn": None,
    "prefect.flow_engine:AsyncFlowRunEngine.call_hooks": None,
    "prefect.flow_engine:AsyncFlowRunEngine.set_state": None,
    "prefect.flow_engine:AsyncFlowRunEngine.handle_crash": None,
    "prefect.flow_engine:AsyncFlowRunEngine.handle_timeout": None,
    "prefect.workers.base:BaseWorker._submit_run": None,
    "prefect.workers.base:BaseWorker._get_scheduled_flow_runs": None,
    "prefect.workers.base:BaseWorker._propose_crashed_state": None,
    "prefect.workers.base:BaseWorker._emit_flow_run_submitted_event": None,
    "prefect.workers.base:BaseWorker._emit_flow_run_executed_event": None,
    "prefect.workers.base:BaseWorker._release_limit_slot": None,
    "prefect.workers.base:BaseJobConfiguration.resolve_for_flow_run": None,
}
"""The names of Prefect that the worker replaces, overrides or calls, each with the first version that may lack it. If
one of the others is missing, the worker would fail silently: a SIGTERM in the middle of all flow runs, or a thread for
each of them."""
AT_ONCE = 16
"""The most requests of `QUEUED` in flight: as many as Prefect's client has connections."""
QUEUED = ("create_flow_run", "read_flow_run", "update_flow_run", "set_flow_run_state")
"""The requests of Prefect's client that each flow run makes. Others, such as a heartbeat, wait for none of them."""
AWAY_PAUSE = 5.0
"""Seconds between two tries to begin a flow run, or to write its state, while the Prefect server cannot be reached."""
REFUSALS = 5
"""Refusals of a flow run's last state after which a plain one is written, since the server may never take the state."""
RENEW_RETRY = 10.0
"""Seconds between two tries to renew a lease while the Prefect server cannot be reached."""
RENEW_AFTER = 0.75
"""The share of a lease's duration after which it is renewed, the same as Prefect's."""
BLOCKED_AFTER = 5.0
"""Seconds that one step of a coroutine may take before a warning names its flow run."""
IDLE_LOOK_EVERY = 0.5
"""Seconds between two looks at whether submitted tasks have ended."""
CANCEL_AGAIN_AFTER = 5.0
"""Seconds within which a cancelled coroutine has to end; after that it is cancelled again each second."""
Ending = Literal["cancelled", "suspended", "handed over", "lost"]
"""The reason why a worker ends a flow run's coroutine: somebody cancelled or suspended the flow run, the worker shuts
down, or another worker has taken it."""


@dataclass(eq=False)
class HeldFlowRun:
    """A flow run whose coroutine runs in this process, on a worker of a work pool.

    `confirm` runs before each write of a state. It ends the coroutine if, on the server, the flow run is suspended or
    has another worker, and returns the flow run if it has asked the server.
    """

    flow_run: FlowRun
    confirm: Callable[[HeldFlowRun, State[Any]], Awaitable[FlowRun | None]]
    ending: Ending | None = None
    reason: str = ""
    task: asyncio.Task[State[Any] | None] | None = None
    has_begun: bool = False
    """Whether the flow's own code has begun, in this attempt."""
    is_out: bool = False
    """Whether the flow's own code has ended after a cancellation."""
    was_cancelled: bool = False
    """Whether an ending was "cancelled", also if "lost" has overridden it."""
    completed: State[Any] | None = None
    """The state of a flow that has ended, once it is to be written."""
    executors: list[ThreadPoolExecutor] = field(default_factory=list[ThreadPoolExecutor])
    """The executors of attempts that are over, in which submitted tasks may still run."""

    @property
    def is_left(self) -> bool:
        has_ended = self.ending is not None or (self.task is not None and self.task.done())
        return has_ended and not self.was_cancelled

    def end(self, ending: Ending, reason: str) -> None:
        """End the coroutine. "lost" overrides an earlier ending, so that this process writes no state to the server.

        A flow that has ended is not handed over: it would run again, only because its state is still to be written.
        """
        if ending == "handed over" and self.completed is not None:
            return
        if self.ending is None or ending == "lost":
            is_first = self.ending is None
            self.ending, self.reason = ending, reason
            self.was_cancelled |= ending == "cancelled"
            if self.task is not None:
                self.task.cancel()
                if is_first:
                    self.task.get_loop().call_later(CANCEL_AGAIN_AFTER, self._cancel_again)

    def _cancel_again(self) -> None:
        """Cancel the coroutine each second, since the flow's code may swallow a CancelledError."""
        writes_end = self.ending == "handed over" and self.completed is not None
        if self.task is not None and not self.task.done() and not self.is_out and not writes_end:
            self.task.cancel()
            self.task.get_loop().call_later(1.0, self._cancel_again)


async def run_held_flow(flow: Flow[Any, Any], held: HeldFlowRun) -> State[Any]:
    """Run the flow of a flow run, like `prefect.flow_engine.run_flow_async`, and return its last state.

    Raises:
        PREFECT_ERRORS: A request to the Prefect API failed before the flow began.
        BaseException: The exception that ended the flow, if it is not an Exception; raised after the state was written.
    """
    engine = _Engine(flow=flow, flow_run=held.flow_run, parameters=held.flow_run.parameters)
    engine.held = held
    async with engine.start():
        while engine.is_running():
            held.has_begun = False
            async with engine.run_context():
                await engine.call_flow_fn()
            await _until_idle(held.executors)  # as in Prefect, before a retry or the end
    return engine.state


async def _until_idle(executors: list[ThreadPoolExecutor]) -> None:
    """Wait until the threads of executors that take no more work have ended. A thread of ours for each would cost more
    than a look."""
    while executors:
        if any(thread.is_alive() for thread in executors[-1]._threads):  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - no public way without a thread that blocks
            await asyncio.sleep(IDLE_LOOK_EVERY)
        else:
            executors.pop()


class _Engine(AsyncFlowRunEngine[Any, Any]):
    held: HeldFlowRun
    flow_run: FlowRun  # pyright: ignore[reportIncompatibleVariableOverride] - the worker always gives one

    async def call_flow_fn(self) -> Any:
        self.held.has_begun = True
        return await super().call_flow_fn()

    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        """Write a state, again and again while the Prefect server cannot be reached."""
        if state.message:
            state.message = state.message.replace("\0", "")  # PostgreSQL refuses it
        if state.is_completed():
            self.held.completed = state
        refusals, is_repeat = 0, False
        while True:
            is_reached = False
            try:
                current = await self.held.confirm(self.held, state) if self.held.ending is None else None
                is_reached = state.is_final()  # `confirm` has read the flow run
                is_of_server = self.held.ending in ("lost", "suspended")  # the server's state must not be overwritten
                if is_of_server or (self.held.ending == "handed over" and not state.is_completed()):
                    raise asyncio.CancelledError  # again: the flow may have swallowed the first one
                if is_repeat and state.is_final() and current is not None and _is_retried_here(current):
                    # The server has taken an earlier try, whose answer was lost. Another try would end the flow run.
                    self.flow_run.state = current.state
                    return self.state
                return await super().set_state(state, force)
            except HTTP_ERRORS as error:
                if not is_transient(error):
                    raise
                refusals = refusals + 1 if is_reached and isinstance(error, STATUS_ERRORS) else 0
                if refusals == REFUSALS:
                    state = Crashed(message=f"The Prefect server refused the state {state.name} of this flow run.")
                self.logger.warning(
                    "The Prefect server did not take the state %s, which is written again: %s", state.name, error
                )
                is_repeat = True
                await asyncio.sleep(AWAY_PAUSE)

    async def handle_timeout(self, exc: TimeoutError) -> None:
        if self.held.completed is None:
            await super().handle_timeout(exc)
        else:  # the flow has ended in time, and only its state comes late
            await self.set_state(self.held.completed)

    async def handle_crash(self, exc: BaseException) -> None:
        self.held.is_out = True
        if self.held.ending is None:
            await super().handle_crash(exc)
            return
        # The worker writes the state to the server.
        self._raised = exc  # type: ignore[assignment]
        if self.held.ending == "cancelled":
            self.flow_run.state = Cancelling(message=self.held.reason)
            # A task group around it may cancel a second time.
            token = held_flow_run.set(None)  # a hook may start a crew
            try:
                with CancelScope(shield=True):
                    await self.call_hooks(self.flow_run.state)
            finally:
                held_flow_run.reset(token)


def _is_retried_here(flow_run: FlowRun) -> bool:
    """Return whether the server has answered the end of an attempt with a retry in the same process."""
    state, policy = flow_run.state, flow_run.empirical_policy
    return state is not None and state.is_scheduled() and policy.retry_type == "in_process"


def check_prefect() -> None:
    """Check that the installed Prefect has all of the NAMES.

    Raises:
        ConfigurationError: Names are missing.
    """
    version = version_numbers(prefect.__version__)
    missing = [
        name
        for name, until in NAMES.items()
        if not _exists(name) and (until is None or version < version_numbers(until))
    ]
    if missing:
        raise ConfigurationError(
            f"The crew worker needs names of Prefect that {prefect.__version__} lacks: {', '.join(missing)}. No flow "
            f"run was begun. It is tested with Prefect {TESTED[0]} to {TESTED[1]}: install one of these."
        )


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


@contextmanager
def many_flow_runs(warn: Callable[..., None]) -> Generator[None]:
    """Prepare this event loop for many flow runs, within the block. A flow run cannot end the loop, and if it blocks
    the loop, `warn` logs a warning."""
    with _light_engine(), _contained_exits(), _warning_when_blocked(warn):
        yield


@contextmanager
def _light_engine() -> Generator[None]:
    """Replace, within the block, the functions by which Prefect's engine starts threads and requests for each flow run.

    This also holds for subflows, which run in Prefect's own engine.
    - `capture_sigterm` would make a SIGTERM raise in the middle of the event loop; the worker has its own handler.
    - `_send_heartbeats` starts a thread for each flow run. The worker's heartbeat is enough for all its flow runs.
    - `observe_flow_run_suspension` starts a thread with an event loop and a subscription for each flow run, and blocks
      at its start and its end. The worker looks for suspended flow runs itself.
    - `amaintain_concurrency_lease` starts a thread with a client for each flow run of a deployment with a limit. It
      crashes the flow run when it cannot renew a lease: if the server cannot be reached, and if the flow run is paused,
      which gives its slot back.
    - Prefect asks the server for its default result storage three times for each flow run, twice by a call that blocks
      the event loop. Once a minute is enough.
    - `ThreadPoolTaskRunner.cancel_all` ends each attempt of a flow run. It would block the event loop until the threads
      of submitted tasks have ended, also if the flow run was cancelled. `run_held_flow` waits for them instead.
    """
    engine, results, threads = prefect.flow_engine, prefect.results, cast("Any", ThreadPoolTaskRunner)
    cancel_all = threads.cancel_all
    ask_server = results._read_server_default_result_storage_block_id  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    @lru_cache(maxsize=1)
    def answer_of(_minute: float) -> Any:
        return ask_server()

    def answer() -> Any:
        return answer_of(time.monotonic() // 60)

    async def aanswer() -> Any:
        return answer()

    def cancel_all_here(runner: Any) -> None:
        executor = runner._executor  # noqa: SLF001
        if executor is not None and loop_runs():
            executor.shutdown(wait=False, cancel_futures=True)
            # Its threads, if it has any: a flow may have thousands of subflows.
            if executor._threads and isinstance(held := held_flow_run.get(), HeldFlowRun):  # noqa: SLF001
                held.executors.append(executor)
            runner._executor = None  # noqa: SLF001 - so that `cancel_all` only sets the tasks' events
        cancel_all(runner)

    replaced: dict[tuple[Any, str], Any] = {
        (engine, "capture_sigterm"): _nothing,
        (engine, "_send_heartbeats"): _nothing,
        (engine, "observe_flow_run_suspension"): _nothing,
        (engine, "amaintain_concurrency_lease"): _renewed_lease,
        (results, "_read_server_default_result_storage_block_id"): answer,
        (results, "_aread_server_default_result_storage_block_id"): aanswer,
        (threads, "cancel_all"): cancel_all_here,
    }
    # `check_prefect` has made sure that only names are missing that may be missing.
    before = {place: getattr(*place) for place in replaced if hasattr(*place)}
    for module, name in before:
        setattr(module, name, replaced[module, name])
    try:
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def _nothing(*_args: Any, **_options: Any) -> nullcontext[None]:
    return nullcontext()


@asynccontextmanager
async def _renewed_lease(lease_id: UUID, lease_duration: float, **_options: Any) -> AsyncGenerator[None]:
    """Renew a flow run's slot in its deployment's limit. A flow run goes on without its slot, as its crew does."""
    renewing = asyncio.create_task(_renew(lease_id, lease_duration), name=f"lease {lease_id}")
    try:
        yield
    finally:
        renewing.cancel()


async def _renew(lease_id: UUID, duration: float) -> None:
    async with AsyncClientContext.get_or_create() as shared:
        pause = duration * RENEW_AFTER
        while True:
            await asyncio.sleep(pause)
            try:
                await shared.client.renew_concurrency_lease(lease_id=lease_id, lease_duration=duration)
                pause = duration * RENEW_AFTER
            except HTTP_ERRORS as error:
                if isinstance(error, STATUS_ERRORS) and error.response.is_client_error:
                    get_run_logger().info("The flow run lost its slot in the deployment's concurrency limit: %s", error)
                    return
                pause = RENEW_RETRY


# The event loop that all flow runs share


def shared(read: Callable[[UUID], Awaitable[Any]]) -> Callable[[UUID], Awaitable[Any]]:
    """Let concurrent calls for the same id share the answer of one request, which is always made after the call.

    Flow runs that begin at the same time are often of one deployment.
    """
    locks: defaultdict[UUID, asyncio.Lock] = defaultdict(asyncio.Lock)
    next_reads: dict[UUID, asyncio.Task[Any]] = {}

    async def read_next(key: UUID) -> Any:
        async with locks[key]:
            del next_reads[key]
            return await read(key)

    async def read_shared(key: UUID) -> Any:
        if key not in next_reads:
            next_reads[key] = asyncio.create_task(read_next(key))
        return await asyncio.shield(next_reads[key])

    return read_shared


def queue_requests(*clients: PrefectClient) -> None:
    """Let the `QUEUED` requests of Prefect's clients wait for their turn before they reach httpx.

    Thousands of flow runs may make a request at the same moment, as where all end, or after an outage of the Prefect
    server. In httpx's own pool each waiting request fails after its timeout, and the pool walks over all of them
    whenever a request comes or ends, which takes all CPU time of the worker.
    """
    turns = asyncio.Semaphore(AT_ONCE)
    for client in {*clients}:
        for name in QUEUED:
            setattr(client, name, _in_turn(getattr(client, name), turns))


def _in_turn(call: Callable[P, Awaitable[T]], turns: asyncio.Semaphore) -> Callable[P, Awaitable[T]]:
    async def call_in_turn(*args: P.args, **kwargs: P.kwargs) -> T:
        async with turns:
            return await call(*args, **kwargs)

    return call_in_turn


@contextmanager
def _contained_exits() -> Generator[None]:
    """Turn a SystemExit or KeyboardInterrupt in an asyncio task that a flow run has created into an InvalidCallError.

    asyncio raises both from the event loop itself, and not where the task is awaited: all flow runs would end.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()

    def create(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return asyncio.Task(work, loop=loop, **options)
        name = f"Flow run {context.flow_run.name!r}"  # for the warning about a blocked event loop
        options["name"] = name
        return asyncio.Task(_without_exit(work, name), loop=loop, **options)

    loop.set_task_factory(create)
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def _without_exit(work: Coroutine[Any, Any, Any], name: str) -> Any:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as exit_:
        raise InvalidCallError(
            f"An asyncio task of {name} raised {type(exit_).__name__}, which would end the worker with all its flow "
            "runs. Raise another error there."
        ) from exit_


@contextmanager
def _warning_when_blocked(warn: Callable[..., None]) -> Generator[None]:
    """Warn about a flow run that blocks the event loop, since no other flow run then goes on or sends a heartbeat."""
    loop, loop_thread, ended = asyncio.get_running_loop(), threading.get_ident(), threading.Event()
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
            task = asyncio.current_task(loop)
            frame = sys._current_frames().get(loop_thread)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - documented, for this
            warn(
                "%s has blocked the event loop for %.0f s, at %s, so all other flow runs wait. Run such work in "
                "`await asyncio.to_thread(…)`, or deploy the flow to a process work pool.",
                "Something" if task is None else task.get_name(),
                seconds,
                frame and f"{frame.f_code.co_filename}:{frame.f_lineno}",
            )

    task = asyncio.create_task(beats())
    thread = threading.Thread(target=watch, name="blocked event loop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        task.cancel()
