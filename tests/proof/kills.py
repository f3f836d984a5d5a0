"""Where a process dies: before, during or after the n-th call of a named function, or of any request or statement.

Used on both sides: a test names the points, and the process that is to die arms itself with one. SIGKILL comes from
within, so that it falls exactly there and nothing in the process hears of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["ANSWERS", "POINTS", "Kill", "arm", "arm_from", "die_after"]

HOOKS = {
    # Functions of the crew database, in a transaction: "before" and "after" are before the commit.
    **{name: ("prefect_crew.store.attempts", name) for name in ("look", "begin", "started", "ended")},
    **{name: ("prefect_crew.store.questions", name) for name in ("ask", "answer", "send", "sent")},
    "continued": ("prefect_crew.store.attempts", "continued"),
    "transaction": ("prefect_crew.store.database", "Store._transact"),
    "statement": ("sqlalchemy.engine.default", "DefaultDialect.do_execute"),
    # Requests.
    **{
        name: ("prefect_crew.client._client", f"CrewClient.{name}")
        for name in ("inputs", "kickoff", "status", "resume")
    },
    "request": ("httpx", "AsyncHTTPTransport.handle_async_request"),
    # What a caller does.
    "open": ("prefect_crew.tasks", "kick_off"),
    "identify": ("prefect_crew.runs.start", "identify"),
    "wait": ("prefect_crew.tasks", "wait_for_run"),
    "artifact": ("prefect_crew.artifacts.run", "MarkdownArtifact._create"),
    "show": ("prefect_crew.artifacts.run", "MarkdownArtifact.keep"),
    "event": ("prefect_crew.artifacts.events", "emit_event"),
    # Batches and their exports.
    "enter-rows": ("prefect_crew.batches.runner", "put_rows"),
    "export": ("prefect_crew.batches.output", "Output.write"),
    "export-page": ("prefect_crew.batches.output", "Output._write_page"),
    "table-prepare": ("prefect_crew.batches.tables", "SqlDatabase.prepare"),
    "table-create": ("sqlalchemy", "Table.create"),
    "table-replace": ("prefect_crew.batches.tables", "SqlDatabase.replace"),
    "table-row": ("prefect_crew.batches.tables", "_storable"),
    "table-commit": ("prefect_crew.batches.tables", "SqlDatabase.commit"),
    "export-noted": ("prefect_crew.store.batches", "note_export"),
    "hold-end": ("prefect_crew.batches.hold", "let_go"),
}
"""The functions by the names that points use. A request is one of either server, made by the process's main thread."""

REQUESTS, STATEMENTS = 16, 20
"""Requests and statements that an undisturbed run always makes, those to the Prefect API among the former."""

When = Literal["before", "during", "after", "committed"]


@dataclass(frozen=True)
class Kill:
    """A point: the `nth` call of `hook`, counted from 1; "during" is `delay` seconds after its beginning, "committed"
    is after the commit of the transaction that it was called in.

    `faults` are what the crew's server does wrong at that time, to hold an answer back.
    """

    hook: str
    when: When
    nth: int = 1
    delay: float = 0.0
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        ordinal = f" {self.nth}" if self.nth > 1 or self.hook in ("request", "statement", "status") else ""
        holding = f" ({', '.join(self.faults)})" if self.faults else ""
        return f"{self.when} {self.hook}{ordinal}{holding}"


def _points() -> Iterator[Kill]:
    for hook in ("open", "identify", "look", "inputs", "begin", "kickoff", "started", "artifact", "wait", "ended"):
        yield Kill(hook, "before")
        if hook not in ("open", "wait"):
            yield Kill(hook, "after")
        if hook in ("begin", "started", "ended"):
            yield Kill(hook, "committed")
    # The answer is held back: before the run is accepted, and after it.
    yield Kill("kickoff", "during", delay=0.2, faults=("kickoff:latency=1",))
    yield Kill("kickoff", "during", delay=0.4, faults=("kickoff:timeout-after-accept=2",))
    yield Kill("inputs", "during", delay=0.2, faults=("inputs:latency=1",))
    yield Kill("status", "during", delay=0.2, faults=("status:latency=1",))
    for nth in (1, 2, 3):
        yield Kill("status", "before", nth)
        yield Kill("status", "after", nth)
    yield Kill("wait", "during", delay=0.5)  # between two looks
    yield Kill("wait", "during", delay=1.0)
    yield Kill("event", "before")  # the end: a script emits no other
    yield Kill("event", "after")
    yield Kill("show", "after")
    yield Kill("wait", "after")
    for nth in range(1, REQUESTS + 1):
        yield Kill("request", "after", nth)
    for nth in range(1, STATEMENTS + 1):
        yield Kill("statement", "before", nth)


POINTS = tuple(_points())
ANSWERS = (
    *(Kill(hook, "committed") for hook in ("ask", "answer", "send", "sent")),
    *(Kill("resume", when) for when in ("before", "after")),
    Kill("resume", "during", delay=0.2, faults=("resume:latency=1",)),
    Kill("sent", "before"),
)
"""Points in the life of an answer."""


def arm(kill: Kill) -> None:
    """Make this process die there."""
    die = _die
    if kill.when == "committed":
        reached = threading.Event()
        die = reached.set
        _wrap("transaction", lambda function: _dying_after(function, reached))
    _wrap(kill.hook, lambda function: _wrapped(function, kill, die))


def _wrap(hook: str, wrapped: Callable[[Any], Any]) -> None:
    module_name, path = HOOKS[hook]
    holder: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        holder = getattr(holder, part)
    setattr(holder, name, wrapped(getattr(holder, name)))


def _dying_after(function: Any, reached: threading.Event) -> Any:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if reached.is_set():
            _die()
        return value

    return called


def arm_from(file: Path) -> None:
    """Arm this process with what a file says, once: whoever takes its place finds the file gone."""
    taken = file.with_suffix(f".{os.getpid()}")
    try:
        file.rename(taken)
    except FileNotFoundError:
        return
    arm(Kill(**json.loads(taken.read_text())))


def order(kill: Kill, file: Path) -> None:
    """Write the file that `arm_from` reads."""
    file.write_text(json.dumps(asdict(kill)))


def _wrapped(function: Any, kill: Kill, die: Callable[[], None]) -> Any:
    calls = 0

    def begins() -> bool:
        nonlocal calls
        if threading.current_thread() is not threading.main_thread() and kill.hook == "request":
            return False
        calls += 1
        if calls != kill.nth:
            return False
        if kill.when == "before":
            _die()
        if kill.when == "during":
            die_after(kill.delay)
        return kill.when in ("after", "committed")

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            last = begins()
            value = await function(*args, **kwargs)
            if last:
                die()
            return value

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        last = begins()
        value = function(*args, **kwargs)
        if last:
            die()
        return value

    return called


def die_after(seconds: float) -> None:
    """Make this process die after so many seconds."""
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
