"""Telling Ctrl-C from other ways in which a wait is cancelled.

asyncio turns a SIGINT into a plain cancellation, the same as a timeout or a SIGTERM under Prefect. Only Ctrl-C on a
program's own terminal means that the person wants the crew stopped, so the signal is noted on its way.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["ctrl_c_pressed", "started_by_runner", "watch_ctrl_c"]


class _Watch:
    def __init__(self) -> None:
        self.users = 0
        self.pressed = False
        self.previous: Any = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.pressed = True
        if callable(self.previous):
            self.previous(signum, frame)


_watch = _Watch()


def started_by_runner() -> bool:
    """Return whether a Prefect runner or worker started this process: its Ctrl-C shuts the worker down, no more."""
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID"))


def ctrl_c_pressed() -> bool:
    """Return whether Ctrl-C was pressed since the first of the waits that are under way began."""
    return _watch.pressed


@contextmanager
def watch_ctrl_c() -> Generator[None]:
    """Note Ctrl-C while this is open, for `ctrl_c_pressed`. The handler that was there is called as before.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        if _watch.users == 0:
            _watch.pressed = False
            _watch.previous = signal.getsignal(signal.SIGINT)
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
