"""When all that a flow run waits for is waiting, so that nothing is cut off by suspending it. Without Prefect or I/O.

Within one process a flow run may have several calls under way, from several threads. Each counts as work, or as a
branch that waits for a crew. A branch leaves its wait once nothing has worked for some seconds; when all have left, one
of them suspends the flow run for all.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_crew.reviewing.forms import Form

__all__ = ["SEE_FIRST", "Branch", "Standstill", "branch_here", "standstill_of"]

SEE_FIRST = 3.0
"""Seconds without any work before a flow run suspends: the pauses between steps are shorter, and a crew that ends
within them, after two looks with the default policy, is not worth a process that ends and another that begins."""


class Branch:
    """One wait of a flow run.

    `ready_at` is when it left its wait to be suspended, None while it looks; `seconds`, how long it may go on, None
    without a limit; `form`, what it asks a person meanwhile, if anything.
    """

    def __init__(self, standstill: Standstill) -> None:
        self.standstill = standstill
        self.ready_at: float | None = None
        self.seconds: float | None = None
        self.form: Form | None = None

    def may_leave(self) -> bool:
        """Return whether the flow run may be suspended as far as this branch can see."""
        return self.standstill.quiet


class Standstill:
    """What one attempt of a flow run does in this process. Its methods may be called from any thread."""

    def __init__(self, *, see_first: float = SEE_FIRST, clock: Callable[[], float] = time.monotonic) -> None:
        self._see_first = see_first
        self._clock = clock
        self._lock = threading.Lock()
        self._working = 0
        self._worked_at = clock()
        self._branches: set[Branch] = set()
        self._leader: Branch | None = None
        self.signal: BaseException | None = None
        """What ends every branch, once the flow run is suspended."""

    @property
    def quiet(self) -> bool:
        """Whether nothing has worked for some seconds."""
        with self._lock:
            return not self._working and self._clock() - self._worked_at >= self._see_first

    @contextmanager
    def work(self) -> Generator[None]:
        """Count as work: a check of inputs, a kickoff, anything that must not be cut off. May be nested."""
        self._change(1)
        depth = _depth.set(_depth.get() + 1)
        try:
            yield
        finally:
            _depth.reset(depth)
            self._change(-1)

    @contextmanager
    def wait(self) -> Generator[Branch]:
        """Count as a branch that waits; the work that this is part of rests meanwhile."""
        resting, branch = _depth.get(), Branch(self)
        depth, here = _depth.set(0), _branch.set(branch)
        with self._lock:
            self._branches.add(branch)
        self._change(-resting)
        try:
            yield branch
        finally:
            _branch.reset(here)
            _depth.reset(depth)
            with self._lock:
                self._branches.discard(branch)
                if self._leader is branch:
                    self._leader = None
            self._change(resting)

    def _change(self, by: int) -> None:
        with self._lock:
            self._working += by
            self._worked_at = self._clock()

    def worked(self) -> None:
        """Note that something has happened: nobody leaves for some seconds."""
        self._change(0)

    def seconds(self) -> list[float | None]:
        """Return for how long each branch may go on."""
        with self._lock:
            return [branch.seconds for branch in self._branches]

    def forms(self) -> list[Form]:
        """Return what people are to be asked, the oldest question first: a flow run shows one form at a time."""
        with self._lock:
            forms = [branch.form for branch in self._branches if branch.form is not None]
        return sorted(forms, key=lambda form: form.since)

    def left(self, branch: Branch) -> None:
        """Note that a branch has left its wait, to be suspended."""
        with self._lock:
            branch.ready_at = self._clock()

    def back(self, branch: Branch) -> None:
        """Note that it looks again, since something else goes on or the flow run could not be suspended."""
        with self._lock:
            branch.ready_at = None
            if self._leader is branch:
                self._leader = None

    def verdict(self, branch: Branch) -> bool | None:
        """Return what a branch that has left does: True, suspend the flow run for all; False, go back; None, stay."""
        with self._lock:
            if self._leader is not None:
                return None
            if self._working or branch.ready_at is None or self._worked_at > branch.ready_at:
                return False
            if any(other.ready_at is None for other in self._branches):
                return None
            self._leader = branch
            return True


_depth: ContextVar[int] = ContextVar("prefect_crew_work", default=0)
_branch: ContextVar[Branch | None] = ContextVar("prefect_crew_branch", default=None)


def branch_here() -> Branch | None:
    """Return the branch that the wait around this call is, None where it cannot be suspended."""
    return _branch.get()


_KEPT = 100
_standstills: OrderedDict[tuple[str, int], Standstill] = OrderedDict()
_lock = threading.Lock()


def standstill_of(flow_run_id: str, attempt: int) -> Standstill:
    """Return that of one attempt of a flow run in this process."""
    with _lock:
        standstill = _standstills.setdefault((flow_run_id, attempt), Standstill())
        _standstills.move_to_end((flow_run_id, attempt))
        while len(_standstills) > _KEPT:
            _standstills.popitem(last=False)
        return standstill
