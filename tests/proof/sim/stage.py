"""Putting a simulation in the place of time, the network and Prefect's contexts, for as long as a world lasts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from unittest import mock

from prefect.client.orchestration import get_client

from prefect_crew._internal import prefect_api, prefect_errors
from prefect_crew.artifacts import events
from prefect_crew.artifacts.run import MarkdownArtifact
from prefect_crew.batches import database
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.client._client import CrewClient
from prefect_crew.crew import Crew
from prefect_crew.devserver import Run
from prefect_crew.records import budgets, prune, store
from prefect_crew.records.model import SPARE, utcnow
from prefect_crew.runs import kickoff, polling, stop
from proof.sim.batch import releasing
from proof.sim.loop import current_process
from proof.sim.prefect_api import API
from proof.sim.site import HOST
from support.transports import carried_by

if TYPE_CHECKING:
    from proof.sim.world import World

__all__ = ["on_stage"]


@contextlib.contextmanager
def on_stage(world: World) -> Iterator[None]:
    """Let this package's core run in a world; what it logs becomes the world's trace."""
    loop = world.loop

    def wall() -> float:
        process = current_process()
        return loop.wall() + (0.0 if process is None else process.clock_error)

    def monotonic() -> float:
        # As on Linux: it stands still while the machine sleeps.
        process = current_process()
        return 1000.0 + loop.time() - (0.0 if process is None else process.slept)

    def now() -> datetime:
        return datetime.fromtimestamp(wall(), UTC)

    def loop_of_this_process() -> prefect_api._Loop:
        # A real process has an event loop of its own: turns that it holds and locks that it has die with it.
        process = current_process()
        return prefect_api._Loop() if process is None else process.facts.setdefault("loop", prefect_api._Loop())

    def flow_run_id() -> str | None:
        process = current_process()
        return None if process is None else process.facts["flow_run_id"]

    # The default of its clock was bound to the real one when the function was made.
    poll = functools.partial(polling.poll, now=wall)
    clock = mock.Mock(time=wall, monotonic=monotonic)
    nothing = mock.AsyncMock(return_value=None)
    replaced: list[tuple[Any, str, Any]] = [
        (kickoff, "identify", world.identify),
        (kickoff, "decide", world.deciding(kickoff.decide)),
        # What a claim is good for is to be enough: an hour more would leave nothing to prune in a world.
        (prune, "YOUNGEST", timedelta(seconds=SPARE)),
        (stop, "_asked", _PerProcess("asked")),
        (prefect_api, "_this_loop", loop_of_this_process),
        # By which an error of ours is told from one of a user's function.
        (prefect_errors, "PREFECT_API_URL", mock.Mock(value=lambda: API)),
        (events, "emit_event", world.emitted),
        (budgets, "emit_event", mock.Mock()),
        (MarkdownArtifact, "keep", nothing),
        (database, "_sqlite", world.batches.engine(database._sqlite)),
        (BatchLock, "_take_file", releasing(BatchLock._take_file)),
        (Run, "end", world.site.noting_end(Run.end)),
        (CrewClient, "kickoff", _noting("posting", CrewClient.kickoff)),
        (store.PrefectRecords, "save", _noting("writing", store.PrefectRecords.save)),
        (store.PrefectRecords, "end", world.ending(store.PrefectRecords.end)),
        (Crew, "reloaded", lambda crew: world.reloaded(crew)),
        *((module, "poll", poll) for module in _modules_with("poll", polling.poll)),
        *((module, "time", clock) for module in _modules_with("time", time)),
        *((module, "get_client", world.prefect.client) for module in _modules_with("get_client", get_client)),
        *((module, "flow_run_id", flow_run_id) for module in _modules_with("flow_run_id", prefect_api.flow_run_id)),
        *((module, "utcnow", now) for module in _modules_with("utcnow", utcnow)),
    ]
    log, handler = logging.getLogger("prefect_crew"), _Trace(world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(carried_by(HOST, world.site.transport))
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch.multiple(log, propagate=False, handlers=[handler]))
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.INFO)  # and no patch: a logger remembers for which level it was off
        yield


def _noting(what: str, function: Any) -> Any:
    """Note in a process's facts that it is within a function: nothing can take back what it was about to send then."""

    async def noted(*args: Any, **kwargs: Any) -> Any:
        facts: dict[str, Any] = process.facts if (process := current_process()) else {}
        facts[what] = facts[f"began {what}"] = True
        facts.pop(f"done {what}", None)
        try:
            value = await function(*args, **kwargs)
        finally:
            facts[what] = False
        facts[f"done {what}"] = asyncio.get_running_loop().time()
        return value

    return noted


def _modules_with(name: str, value: Any) -> list[Any]:
    ours = [module for path, module in list(sys.modules.items()) if path.startswith("prefect_crew.")]
    return [module for module in ours if vars(module).get(name) is value]


class _PerProcess:
    """A dictionary of which each simulated process has its own, as real ones have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)

    def _own(self) -> OrderedDict[Any, Any]:
        process = current_process()
        facts = {} if process is None else process.facts
        return facts.setdefault(self._name, OrderedDict())

    def __len__(self) -> int:
        return len(self._own())

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own()[key] = value


class _Trace(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        if process is not None and process.buried:
            return
        name = process.name if process else "server"
        self._world.trace.append(f"{self._world.loop.time():8.2f} {name} {record.getMessage()}")
