"""An event loop whose time is not real, and processes on it that die as if by SIGKILL.

Time jumps to the next timer as soon as nothing is left to do, so a day of waiting takes a millisecond and a scenario
gives the same course of events each time. A process is everything that was started within its context; killing it
means that none of its coroutines is advanced any more: no `except`, no `finally`, no flush, as with the real signal.
What it has sent by then goes on, since that is no longer its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio

__all__ = ["EPOCH", "Process", "SimLoop", "StuckError", "current_process"]

EPOCH = 1_750_000_000.0
"""When simulated time begins, in seconds since 1970."""
RESOLUTION = 1e-6
"""Seconds, more than the resolution of an event loop's clock: sums of times are no more exact."""
IN_THREAD = 0.001
"""Seconds until a caller hears of the work that it gave to a thread."""
FOREVER = 1e6
"""Seconds; longer than any world lasts."""

_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("proof_process", default=None)


class StuckError(AssertionError):
    """Nothing is left to do and something still waits: it would wait for ever."""


def current_process() -> Process | None:
    """Return the process that runs at this moment, None on the servers' side."""
    return _current.get()


class Process:
    """Something that can be killed, frozen or cancelled at any of its steps.

    A step is one advance of one of its coroutines, from one await to the next; they are counted from 1.

    Args:
        name: For descriptions.
        kill_at: The step before which it dies.
        freeze_at, freeze_for: The step before which it stands still (a closed laptop), and for how many seconds.
        cancel_at: The step before which its main coroutine is cancelled, once, or each of its `scopes`, which cancel at
            every await until they are left; `on_cancel` is called just before.
        on_fate: Is called with the name of one of these when it comes: "killed", "asleep" or "cancelled".
        skew, skew_at: By how many seconds its wall clock is wrong, and from which step on; None: always.
    """

    def __init__(
        self,
        name: str,
        *,
        kill_at: int | None = None,
        freeze_at: int | None = None,
        freeze_for: float = 0.0,
        cancel_at: int | None = None,
        on_cancel: Callable[[Process], None] | None = None,
        on_fate: Callable[[Process, str], None] | None = None,
        skew: float = 0.0,
        skew_at: int | None = None,
    ) -> None:
        self.name = name
        self.steps = 0
        self.dead = False
        self.died_at = 0.0
        self.frozen_until = 0.0
        self.was_frozen = False
        self.slept = 0.0
        self.frozen_in: set[str] = set()
        self.was_cancelled = False
        self.died: asyncio.Event = asyncio.Event()
        self.at_death: list[Callable[[], None]] = []
        self.facts: dict[str, Any] = {}
        self.main: asyncio.Task[Any] | None = None
        self.scopes: list[anyio.CancelScope] = []
        self.coroutines: list[Coroutine[Any, Any, Any]] = []
        self.tasks: list[asyncio.Task[Any]] = []  # the loop itself holds no task that waits for nothing any more
        self._kill_at = kill_at
        self._freeze_at = freeze_at
        self._freeze_for = freeze_for
        self._cancel_at = cancel_at
        self._on_cancel = on_cancel
        self._on_fate = on_fate or (lambda process, fate: None)
        self._skew = skew
        self._skew_at = skew_at
        self.buried = False

    def __repr__(self) -> str:
        return f"<{self.name}{' dead' if self.dead else ''} at step {self.steps}>"

    @property
    def clock_error(self) -> float:
        """By how many seconds its wall clock is wrong at this moment."""
        return self._skew if self._skew_at is None or self.steps >= self._skew_at else 0.0

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as this process's main one."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        self.main = context.run(asyncio.get_running_loop().create_task, coroutine)
        return self.main

    def kill(self) -> None:
        """End it as SIGKILL would."""
        self.dead = True
        self.died_at = asyncio.get_running_loop().time()
        for release in self.at_death:
            release()
        self.died.set()

    def bury(self) -> None:
        """Let what is left of a dead process be cancelled, once nothing that it does can matter any more."""
        self.buried = True
        for coroutine in self.coroutines:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()  # it would complain that nobody ever awaited it

    def step(self) -> str | None:
        """Count a step; say what comes instead of it: None, "dead" or "frozen"."""
        if self.buried:
            return None
        if self.dead:
            return "dead"
        self.steps += 1
        if self.steps == self._kill_at:
            self._on_fate(self, "killed")
            self.kill()
            return "dead"
        if self.steps == self._freeze_at:
            self._on_fate(self, "asleep")
            self.was_frozen = True
            self.frozen_in = {what for what in ("posting", "writing") if self.facts.get(what)}
            self.frozen_until = asyncio.get_running_loop().time() + self._freeze_for
            self.slept += self._freeze_for
        if self.steps == self._cancel_at and self.main is not None:
            self._on_fate(self, "cancelled")
            self.was_cancelled = True
            if self._on_cancel:
                self._on_cancel(self)
            for scope in self.scopes:
                scope.cancel()
            if not self.scopes:
                self.main.cancel()
        return "frozen" if self.is_frozen else None

    @property
    def is_frozen(self) -> bool:
        """Whether the process sleeps: an event loop also calls what is due within the resolution of its clock."""
        return self.frozen_until - asyncio.get_running_loop().time() > RESOLUTION


class _Guarded:
    """Forwards to a coroutine as long as its process lives."""

    def __init__(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._process = process
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            while (instead := self._process.step()) is not None:
                loop = asyncio.get_running_loop()
                waiting = loop.create_future()
                if instead == "frozen":
                    loop.call_at(self._process.frozen_until, _wake, waiting)
                try:
                    yield from waiting
                except asyncio.CancelledError as cancelled:
                    # Whoever is frozen learns of it when it thaws; whoever is dead never does.
                    error = cancelled
            try:
                yielded = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration as end:
                return end.value
            value = error = None
            try:
                value = yield yielded
            except GeneratorExit:
                raise
            except BaseException as thrown:
                error = thrown


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _guarded(process: Process, coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await _Guarded(process, coroutine)


class _Selector(selectors.SelectSelector):
    """Never waits: tells the loop to move its clock instead."""

    def __init__(self, pass_time: Callable[[float], None]) -> None:
        super().__init__()
        self._pass_time = pass_time

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise StuckError("nothing is left to do, and something still waits")
        if timeout > 0:
            self._pass_time(timeout)
        return []


class _Shuffled(deque[Any]):
    """Gives what is ready in an order that a seed draws."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def popleft(self) -> Any:
        if len(self) > 1:
            place = self._rng.randrange(len(self))
            self.rotate(-place)
            first = super().popleft()
            self.rotate(place)
            return first
        return super().popleft()


class SimLoop(asyncio.SelectorEventLoop):
    """The loop. `time()` are seconds since the scenario began; `wall()` are seconds since 1970.

    Args:
        order: A seed of the order in which callbacks run that are ready at one moment; 0: first in, first out.
    """

    _ready: deque[Any]

    def __init__(self, order: int = 0) -> None:
        self._now = 0.0
        self._servers = contextvars.Context()
        super().__init__(_Selector(self._pass))
        self.set_task_factory(_make_task)
        if order:
            self._ready = _Shuffled(random.Random(order))

    def _pass(self, seconds: float) -> None:
        self._now += seconds

    def time(self) -> float:
        return self._now

    def wall(self) -> float:
        """Return the right time, whatever the clock of a machine says."""
        return EPOCH + self._now

    # anyio cancels a task again and again, in no time, until that has heard of it: what is dead or asleep never does.
    # So its callbacks wait as well. Those of tasks do not, since `_Guarded` sees to them.

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        if inspect.ismethod(callback) and (until := self._held(context)) is not None:
            return self.call_at(until, callback, *args, context=context)
        return super().call_soon(callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        if inspect.ismethod(callback):
            known: list[asyncio.TimerHandle] = []
            known.append(super().call_at(when, self._due, callback, args, known, context=context))
            return known[0]
        return super().call_at(when, callback, *args, context=context)

    def _due(self, callback: Any, args: tuple[Any, ...], known: list[asyncio.TimerHandle]) -> None:
        if known[0].cancelled():  # while its process was asleep: nobody knows another handle
            return
        if (until := self._held(None)) is None:
            callback(*args)
        else:
            super().call_at(until, self._due, callback, args, known)

    def _held(self, context: contextvars.Context | None) -> float | None:
        """Return until when a process does nothing, None if it is awake."""
        process = _current.get() if context is None else context.get(_current)
        if process is None or process.buried:
            return None
        if process.dead:
            return self._now + FOREVER
        return process.frozen_until if process.is_frozen else None

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        # Without threads: the work is done at once, and its caller hears of it a moment later.
        done = self.create_future()
        try:
            value, error = func(*args), None
        except Exception as raised:
            value, error = None, raised
        self.call_later(IN_THREAD, _settle, done, value, error)
        return done

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        # With one thread, this is how a client hands over to a server: what that does is not the client's.
        return self.call_soon(callback, *args, context=self._servers.copy() if context is None else context)


def _settle(done: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(value)
    else:
        done.set_exception(error)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    process = (options.get("context") or contextvars.copy_context()).get(_current)
    if process is None:
        return asyncio.Task(coroutine, loop=loop, **options)
    task = asyncio.Task(_guarded(process, coroutine), loop=loop, **options)
    process.coroutines.append(coroutine)
    process.tasks.append(task)
    return task
