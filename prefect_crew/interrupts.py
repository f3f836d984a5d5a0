"""Telling Ctrl-C from other ways in which a wait is cancelled.

asyncio turns a SIGINT into a plain cancellation, the same as a timeout or a SIGTERM under Prefect. Only Ctrl-C on a
program's own terminal means that the person wants the crew stopped, so the signal is noted on its way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from prefect.exceptions import ExternalSignal

__all__ = [
    "ENDINGS",
    "ctrl_c_cancels_this_task",
    "ctrl_c_pressed",
    "started_by_runner",
    "to_be_seen_to_its_end",
    "watch_ctrl_c",
]


ENDINGS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, ExternalSignal)
"""How a task is ended from outside: cancelled, or by a signal whose exception was raised in the midst of it."""


class _Watch:
    def __init__(self) -> None:
        self.users = 0
        self.pressed = False
        self.previous: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.cancel: Callable[[], None] | None = None
        self.kept: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.pressed = not self.pressed, True
        for task in tuple(self.kept):
            asyncio.tasks._unregister_task(task)  # noqa: SLF001  # documented, for those who extend asyncio
        if first and self.cancel is not None:
            self.cancel()
        elif first and self.loop is not None and self.previous is signal.default_int_handler:
            # Between two steps of the loop: in the midst of one it could cut off what writes down a kickoff.
            self.loop.call_soon_threadsafe(signal.default_int_handler, signum, None)
        elif callable(self.previous):
            self.previous(signum, frame)


_watch = _Watch()


def started_by_runner() -> bool:
    """Return whether a Prefect runner or worker started this process: its Ctrl-C shuts the worker down, no more."""
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID"))


def ctrl_c_pressed() -> bool:
    """Return whether Ctrl-C was pressed since the first of the waits that are under way began."""
    return _watch.pressed


def to_be_seen_to_its_end(task: asyncio.Task[Any]) -> None:
    """Let Ctrl-C end whoever waits for a task, and not the task: it holds a request that must not be cut off.

    From Python 3.11 on asyncio cancels the main task alone. Before, `asyncio.run` cancels every task that the loop
    knows of, shielded or not; so once Ctrl-C is pressed the loop is not to know of this one. Whoever calls this waits
    for it.
    """


@contextmanager
def ctrl_c_cancels_this_task() -> Generator[None]:
    """Have Ctrl-C cancel this task first and no other while this and a `watch_ctrl_c` are open.

    From Python 3.11 on asyncio does so itself. Before, it cancels all tasks at once, and whoever wants to end its own
    in order finds them gone.

    Raises:
        KeyboardInterrupt: Ctrl-C cancelled this task.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if sys.version_info >= (3, 11) or threading.current_thread() is not threading.main_thread() or task is None:
        yield
        return
    cancelled = False

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True
        loop.call_soon_threadsafe(task.cancel)

    _watch.cancel = cancel
    try:
        yield
    except asyncio.CancelledError:
        if cancelled:
            raise KeyboardInterrupt from None
        raise
    finally:
        _watch.cancel = None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def watch_ctrl_c() -> Generator[None]:
    """Note Ctrl-C while this is open, for `ctrl_c_pressed`. The handler that was there is called as before; Python's
    own, which raises KeyboardInterrupt wherever the program is, by the loop, and at once when pressed again.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
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
            # Somebody may have set another handler on top meanwhile, which is then theirs to keep.
            if _watch.users == 0 and signal.getsignal(signal.SIGINT) == _watch.handle:
                signal.signal(signal.SIGINT, _watch.previous)
                _watch.loop = None
