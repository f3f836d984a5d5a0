"""One async implementation, callable from sync and from async code, the way Prefect's own tools behave."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.exceptions import InvalidCallError

P = ParamSpec("P")
T = TypeVar("T")


def in_async_context() -> bool:
    """Return whether the caller can await: an event loop runs here, and the task or flow around it is async, if any."""
    if not _loop_runs():
        return False
    task_context, flow_context = TaskRunContext.get(), FlowRunContext.get()
    if task_context is not None:
        return bool(task_context.task.isasync)
    if flow_context is not None and flow_context.flow is not None:
        return bool(flow_context.flow.isasync)
    return True


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from sync code, with the caller's context variables."""
    if not _loop_runs():
        return asyncio.run(coroutine)
    # A sync flow that an async one called: its thread's loop is busy with us, so the coroutine gets a thread.
    context = contextvars.copy_context()
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(context.run, asyncio.run, coroutine).result()


def dual(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Any]:
    """Make an async function answer with its result in sync code and with an awaitable in async code."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        coroutine = function(*args, **kwargs)
        return coroutine if in_async_context() else run_sync(coroutine)

    return call


def sync_version(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the sync function for an async one whose name begins with an `a`. In a running event loop it raises."""
    name = function.__name__.removeprefix("a")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _loop_runs():
            del args, kwargs  # error reporters show the variables of frames
            raise InvalidCallError(
                f"{name}() would block the event loop that runs here: use `await {function.__name__}(...)` instead."
            )
        coroutine = function(*args, **kwargs)
        args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]
        return asyncio.run(coroutine)

    call.__name__ = call.__qualname__ = name
    return call
