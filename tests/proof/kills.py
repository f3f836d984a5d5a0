"""Where a process dies: before, during or after the n-th call of a named function, or of any request it makes.

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["POINTS", "Kill", "arm", "arm_from", "die_after"]

HOOKS = {
    "open": ("prefect_crew.tasks", "kick_off"),
    "identify": ("prefect_crew.runs.kickoff", "identify"),
    "claim": ("prefect_crew.records.store", "PrefectRecords.claim"),
    "confirm": ("prefect_crew.records.store", "PrefectRecords.confirm"),
    "permit": ("prefect_crew.records.store", "PrefectRecords.permit"),
    "turn": ("prefect_crew.runs.kickoff", "take_turn"),
    "name": ("prefect_crew.records.store", "PrefectRecords._name_kickoff"),
    "inputs": ("prefect_crew.client._client", "CrewClient.inputs"),
    "kickoff": ("prefect_crew.client._client", "CrewClient.kickoff"),
    "save": ("prefect_crew.records.store", "PrefectRecords.save"),
    "end": ("prefect_crew.records.store", "PrefectRecords.end"),
    "unlist": ("prefect_crew.records.store", "PrefectRecords.unlist"),
    "artifact": ("prefect_crew.artifacts.run", "MarkdownArtifact._create"),
    "wait": ("prefect_crew.tasks", "wait_for_run"),
    "status": ("prefect_crew.client._client", "CrewClient.status"),
    "show": ("prefect_crew.artifacts.run", "MarkdownArtifact.keep"),
    "event": ("prefect_crew.artifacts.events", "emit_event"),
    "request": ("httpx", "AsyncHTTPTransport.handle_async_request"),
    "row-begin": ("prefect_crew.store.attempts", "begin"),
    "row-started": ("prefect_crew.store.attempts", "started"),
    "row-ended": ("prefect_crew.store.attempts", "ended"),
    "store-commit": ("prefect_crew.store.database", "Store._transact"),
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

REQUESTS = 16
"""Requests that an undisturbed run always makes, those to the Prefect API for its flow and its tasks among them."""

When = Literal["before", "during", "after"]


@dataclass(frozen=True)
class Kill:
    """A point: the `nth` call of `hook`, counted from 1; "during" is `delay` seconds after its beginning.

    `faults` are what the crew's server does wrong at that time, to hold an answer back.
    """

    hook: str
    when: When
    nth: int = 1
    delay: float = 0.0
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        ordinal = f" {self.nth}" if self.nth > 1 or self.hook in ("request", "status") else ""
        holding = f" ({', '.join(self.faults)})" if self.faults else ""
        return f"{self.when} {self.hook}{ordinal}{holding}"


def _points() -> Iterator[Kill]:
    for hook in (
        *("open", "identify", "claim", "confirm", "inputs", "permit", "kickoff", "save", "name", "artifact"),
        "wait",
    ):
        yield Kill(hook, "before")
        if hook not in ("open", "wait"):
            yield Kill(hook, "after")
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
    yield Kill("end", "before")
    yield Kill("end", "after")
    yield Kill("event", "before")  # the end: a script emits no other
    yield Kill("event", "after")
    yield Kill("unlist", "after")
    yield Kill("show", "after", 1)
    yield Kill("wait", "after")
    for nth in range(1, REQUESTS + 1):
        yield Kill("request", "before", nth)
        yield Kill("request", "after", nth)


POINTS = tuple(_points())


def arm(kill: Kill) -> None:
    """Make this process die there."""
    module_name, path = HOOKS[kill.hook]
    holder: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        holder = getattr(holder, part)
    setattr(holder, name, _wrapped(getattr(holder, name), kill))


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


def _wrapped(function: Any, kill: Kill) -> Any:
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
        return kill.when == "after"

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            last = begins()
            value = await function(*args, **kwargs)
            if last:
                _die()
            return value

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        last = begins()
        value = function(*args, **kwargs)
        if last:
            _die()
        return value

    return called


def die_after(seconds: float) -> None:
    """Make this process die after so many seconds."""
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
