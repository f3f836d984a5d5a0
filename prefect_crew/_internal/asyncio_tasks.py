"""Coroutines in asyncio tasks, and coroutines from sync code.

A cancelled task completes its cleanup before it ends. A sync twin runs the coroutine of its async function, also in a
sync flow that an async flow has called.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import anyio
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import ExternalSignal

from prefect_crew.exceptions import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")
LOOK_EVERY = 0.2
"""Seconds between two checks of blocked sync code whether the task around it was cancelled."""
UNCUT_FOR = 5.0
"""Seconds, after a cancellation, for which `OwnTask.uncut` holds if the caller of `run` gives no limit (`within`)."""
ENDINGS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, ExternalSignal)
"""The exceptions that end a task from outside: its cancellation, or the exception of a signal."""


async def cancel_and_wait(*tasks: asyncio.Future[Any], within: float | None = None) -> None:
    """Cancel each task once, and return when all have ended, with or without an error, or after `within` seconds.

    With `asyncio.gather`, a second cancellation of the caller would cancel the tasks a second time and interrupt their
    cleanup, such as a POST in flight or the stop of a crew.
    """
    for task in tasks:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs its error
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=within)


async def call_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own, in the context of the caller, and return its result.

    If the caller is cancelled, the thread goes on, and neither the event loop nor the process waits for its end. They
    would wait for minutes for a thread of `asyncio.to_thread`.
    """
    context, result = contextvars.copy_context(), Future[T]()

    def work() -> None:
        result.set_running_or_notify_cancel()  # so that a cancelled caller does not cancel it
        try:
            result.set_result(context.run(function, *args))
        except StopIteration as error:  # asyncio refuses it
            result.set_exception(RuntimeError(repr(error)))
        except BaseException as error:  # noqa: BLE001  the await of the result raises it
            result.set_exception(error)

    threading.Thread(target=work, name=getattr(function, "__name__", None), daemon=True).start()
    return await asyncio.wrap_future(result)


class OwnTask:
    """A coroutine in a task of its own. A cancellation of the caller cancels the task once, and not within `uncut`.

    A timeout of Prefect is a cancel scope of anyio: it cancels at every await until the code leaves the scope, also
    through `asyncio.gather`. It would interrupt the cleanup of a cancelled start, wait or batch, which gives an attempt
    back, waits for the answer to a kickoff, or stops a crew.
    """

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self._is_uncut = False

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller was cancelled."""
        return self.cancelled.is_set()

    async def run(self, coroutine: Coroutine[Any, Any, T], *, within: float | None = None) -> T:
        """Return the coroutine's result. A cancellation of the caller cancels the coroutine once, except in `uncut`.

        Then wait for the coroutine's end, at most `within` seconds; a coroutine that takes longer goes on by itself.
        Without `within`, wait without a limit, and after five seconds cancel also a coroutine that was in `uncut`.
        """
        task = asyncio.create_task(coroutine)
        # When an event loop ends, for example on a signal or the timeout of a sync flow, it cancels all registered
        # tasks: so it cancels the caller, which waits here, and not this task.
        asyncio.tasks._unregister_task(task)  # noqa: SLF001  documented, for those who extend asyncio
        try:
            await asyncio.wait({task})
        except BaseException:
            self.cancelled.set()
            loop = asyncio.get_running_loop()
            if not self._is_uncut:
                task.cancel()
            elif within is None:
                loop.call_later(UNCUT_FOR, task.cancel)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs its error
            until = None if within is None else loop.time() + within
            while not task.done() and (until is None or loop.time() < until):
                with suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
                    await asyncio.wait({task}, timeout=None if until is None else until - loop.time())
            raise
        return task.result()

    @contextmanager
    def uncut(self) -> Generator[None]:
        """Protect the awaits in this block from a cancellation. The coroutine checks `is_cancelled` afterwards."""
        self._is_uncut = True
        try:
            yield
        finally:
            self._is_uncut = False

    def raise_if_cancelled(self) -> None:
        """Raise CancelledError if the caller was cancelled, also during `uncut`."""
        if self.is_cancelled:
            raise asyncio.CancelledError


def cancelled_once(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a coroutine function run as an `OwnTask`, which a cancellation of the caller cancels once and waits for."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await OwnTask().run(function(*args, **kwargs))

    return call


# From sync code


def in_async_context() -> bool:
    """Return whether the caller can await: an event loop runs here, and no sync task or flow is around the call.

    A sync flow that an async flow has called runs on the thread of that event loop, and cannot await.
    """
    if not loop_runs():
        return False
    task_context, flow_context = TaskRunContext.get(), FlowRunContext.get()
    around: Any = None
    if task_context is not None:
        around = task_context.task
    elif flow_context is not None:
        around = flow_context.flow
    return around is None or bool(around.isasync)


def loop_runs() -> bool:
    """Return whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from sync code, with the caller's context variables."""
    if not loop_runs():
        return asyncio.run(coroutine)
    # In a sync flow that an async flow has called, this call blocks the thread's loop: the coroutine gets a thread.
    begun: Future[Callable[[], Any]] = Future()

    async def work() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(coroutine)
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await task

    def cancel() -> None:
        with suppress(RuntimeError):  # the loop has just ended
            begun.result()()

    context, around = contextvars.copy_context(), asyncio.current_task()
    before = 0 if around is None else around.cancelling()
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(context.run, asyncio.run, work())
        try:
            # Ctrl-C only cancels the task around this call, and that cannot end: its loop is blocked.
            while not wait({running}, timeout=LOOK_EVERY).done:
                if around is not None and around.cancelling() > before:
                    before = around.cancelling()
                    cancel()
            return running.result()
        except BaseException:
            if not running.done():  # a signal or a timeout raised here, not the coroutine
                cancel()
            raise


def sync_version(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the sync twin of an async function whose name begins with an `a`.

    If the caller can await, the twin raises, since it would block the event loop.
    """
    name = function.__name__.removeprefix("a")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if in_async_context():
            args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
            raise ConfigurationError(
                f"{name}() would block the event loop that runs here. Write `await {function.__name__}(...)` instead."
            )
        coroutine = function(*args, **kwargs)
        args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]
        return run_sync(coroutine)

    call.__name__ = call.__qualname__ = name
    return call
