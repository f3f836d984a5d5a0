"""Telling Ctrl-C from other ways in which a wait is cancelled; ending tasks, and what a cancelled one has left to do.

asyncio turns a SIGINT into a plain cancellation, the same as a timeout or a SIGTERM under Prefect. Only Ctrl-C on a
program's own terminal means that the person wants the crew stopped, so the signal is noted on its way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import anyio
from prefect.exceptions import ExternalSignal

P = ParamSpec("P")
T = TypeVar("T")
ENDINGS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, ExternalSignal)
"""How a task is ended from outside: cancelled, or by a signal whose exception was raised in the midst of it."""


class _Watch:
    def __init__(self) -> None:
        self.users = 0
        self.pressed = False
        self.previous: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.pressed = not self.pressed, True
        if first and self.loop is not None and self.previous is signal.default_int_handler:
            # Between two steps of the loop: in the midst of one it could cut off what writes down a kickoff.
            self.loop.call_soon_threadsafe(signal.default_int_handler, signum, None)
        elif callable(self.previous):
            self.previous(signum, frame)


_watch = _Watch()


def started_by_runner() -> bool:
    """Return whether a Prefect runner or worker started this process, or is it: Ctrl-C shuts that down, no more.

    A worker names itself in its own environment, and in that of the processes that it starts.
    """
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID") or os.environ.get("PREFECT__WORKER_NAME"))


def ctrl_c_pressed() -> bool:
    """Return whether Ctrl-C was pressed since the first of the waits that are under way began."""
    return _watch.pressed


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks once each, and return when all have ended, however they did.

    Not `asyncio.gather`: a second cancellation of the caller would cancel the tasks a second time, and cut off what
    they finish after the first one: a POST in flight, the stop of a crew.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody has asked for it


def cancelled_once(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Have a cancellation reach a coroutine once, and see what it then does to its end.

    A timeout of Prefect is a cancel scope of anyio: it cancels at every await until the scope is left, also through
    `asyncio.gather`, and would cut off what a cancelled start, wait or batch has to do yet: give a claim back, see a
    kickoff in flight to its end, stop a crew. That has time limits of its own.
    """

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        work = asyncio.create_task(function(*args, **kwargs))
        args, kwargs = (), {}  # pyright: ignore[reportAssignmentType]  error reporters show the variables of frames
        try:
            await asyncio.wait({work})
        except BaseException:
            if not work.done() and not work.cancelling():  # a loop that ends has cancelled all of its tasks itself
                work.cancel()
            while not work.done():
                with suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
                    await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # or asyncio complains that nobody has asked for it
            raise
        return work.result()

    return call


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def watch_ctrl_c() -> Generator[None]:
    """Note Ctrl-C while this is open, for `ctrl_c_pressed`. The handler that was there is called as before; Python's
    own, which raises KeyboardInterrupt wherever the program is, by the loop, and at once when pressed again.

    Outside the main thread, where Python allows no handlers, it does nothing; nor under a runner or worker.
    """
    in_main = threading.current_thread() is threading.main_thread() and not started_by_runner()
    if in_main:
        if _watch.users == 0:
            _watch.pressed = False
            _watch.previous = signal.getsignal(signal.SIGINT)
            _watch.loop = _running_loop()
            signal.signal(signal.SIGINT, _watch.handle)
        _watch.users += 1
    try:
        yield
    finally:
        if in_main:
            _watch.users -= 1
            # Somebody may have set another handler on top, which is then theirs to keep.
            if _watch.users == 0 and signal.getsignal(signal.SIGINT) == _watch.handle:
                signal.signal(signal.SIGINT, _watch.previous)
                _watch.loop = None
