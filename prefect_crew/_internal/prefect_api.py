"""Functions that Prefect's client and contexts lack: all pages of an answer, the contexts around a call, a lock for
each event loop, and a logger that writes each message on one line.

Private API of Prefect is used in `contexts_around` and `is_entered`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import ContextModel, FlowRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import one_line

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger | logging.LoggerAdapter[Any]]
else:
    Adapter = logging.LoggerAdapter

T = TypeVar("T")
ContextT = TypeVar("ContextT", bound=ContextModel)


class OneLine(Adapter):
    """A logger that writes each message on one line, so that a crew's text cannot add lines or control a terminal."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message."""
        if self.isEnabledFor(level):
            kwargs.setdefault("stacklevel", 2)
            self.logger.log(level, "%s", one_line(str(msg) % args if args else str(msg)), **kwargs)


def run_logger() -> OneLine:
    """Return the logger of the current task or flow run, else the package's."""
    try:
        return OneLine(get_run_logger(), {})
    except MissingContextError:
        return OneLine(logging.getLogger("prefect_crew"), {})


def flow_run_id() -> str | None:
    """Return the id of the flow run around this call, or None."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


async def read_all(read: Callable[..., Awaitable[Sequence[T]]], **filters: Any) -> list[T]:
    """Return all objects that a method of Prefect's client finds. It returns at most 200 at a time."""
    objects: list[T] = []
    while len(objects) % 200 == 0:
        page = await read(**filters, limit=200, offset=len(objects))
        objects += page
        if not page:
            break
    return objects


async def label_flow_run(*, name: str) -> None:
    """Rename the flow run around this call. If the Prefect API cannot be reached, log that and keep the name."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    if flow_run is None or name == flow_run.name:  # an earlier attempt of the flow run has renamed it
        return
    try:
        async with get_client() as client:
            await client.update_flow_run(flow_run.id, name=name)
        flow_run.name = name
    except PREFECT_ERRORS as error:
        run_logger().debug("The flow run could not be renamed: %s", error)


Ending = Literal["cancelled", "suspended", "handed over", "lost"]
"""The reason why a worker ends a flow run's coroutine: somebody cancelled or suspended the flow run, the worker shuts
down, or another worker has taken it."""
CANCEL_AGAIN_AFTER = 5.0
"""Seconds within which a cancelled coroutine has to end; then it is cancelled again, since its code may swallow one."""


@dataclass(eq=False)
class HeldFlowRun:
    """A flow run whose coroutine runs, or has run, on the crew worker of this process, in the event loop `loop`.

    `is_out` says that the flow's own code has ended after a cancellation; `threads` wait for the end of its submitted
    tasks.
    """

    flow_run: FlowRun
    loop: asyncio.AbstractEventLoop
    ending: Ending | None = None
    reason: str = ""
    task: asyncio.Task[Any] | None = None
    is_out: bool = False
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])

    @property
    def was_cancelled(self) -> bool:
        return self.ending == "cancelled"

    @property
    def is_left(self) -> bool:
        """Whether the coroutine has ended, or has to, and nobody has cancelled the flow run."""
        has_ended = self.ending is not None or (self.task is not None and self.task.done())
        return has_ended and not self.was_cancelled

    def end(self, ending: Ending, reason: str) -> None:
        """End the coroutine; call it from any thread. Of several reasons the first one counts."""
        if self.ending is None:
            self.reason, self.ending = reason, ending
            self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.is_out or (self.task is not None and self.task.done()):
            return
        if self.task is not None:
            self.task.cancel()
        self.loop.call_later(CANCEL_AGAIN_AFTER, self._cancel)


# Not an argument: the tasks, threads and subflows of a flow outlive its coroutine, and only their context is known to
# the worker. Not by id: a thread that has survived since before the flow run began again belongs to the ended one.
held_flow_run: ContextVar[HeldFlowRun | None] = ContextVar("prefect_crew_held", default=None)
"""The flow run around the call on a crew worker. None within its hooks, which may start crews."""


def left_behind(held: HeldFlowRun) -> asyncio.CancelledError:
    """Return the error of a call in a task or thread that outlives its flow run on a crew worker.

    It ends there as it would with the process of another worker: no `except Exception` takes it, so no task stores an
    outcome that the flow run's next start would find.
    """
    text = f"A task of flow run {flow_run_id()}, which has ended on this worker, starts no crew. {held.reason}".rstrip()
    run_logger().warning("%s", text)
    return asyncio.CancelledError(text)


def contexts_around(kind: type[ContextT]) -> list[ContextT]:
    """Return Prefect's contexts of a kind around this call, the innermost first.

    Prefect's public API returns only the innermost one. The context before is in the token that will restore it.
    """
    contexts: list[ContextT] = []
    context: Any = kind.get()
    while isinstance(context, kind):
        contexts.append(context)
        token = context._token  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        context = None if token is None else token.old_value
    return contexts


def is_entered(context: ContextModel) -> bool:
    """Return whether a Prefect context is still active. Other code may keep the object of a context that has ended."""
    return context._token is not None  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


# By event loop, since a lock belongs to one. Module-level: the calls of one loop come from independent flows.
_locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Lock]] = weakref.WeakKeyDictionary()


def lock_here(name: str) -> asyncio.Lock:
    """Return the running event loop's lock with this name."""
    loop = asyncio.get_running_loop()
    if loop not in _locks:
        for other in [other for other in list(_locks) if other.is_closed()]:
            _locks.pop(other, None)  # a lock for which somebody waited keeps its loop, and so this entry
    return _locks.setdefault(loop, {}).setdefault(name, asyncio.Lock())
