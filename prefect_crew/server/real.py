"""Real CrewAI code as a program of the local crew server: a function that builds a Crew or a Flow.

    program = load_real("examples/travel_crew.py:build")

Every run gets a crew of its own and a thread of its own, so the event loop stays free. CrewAI is imported by
`load_real`, not by this module. Crews write to a directory that goes with the process, unless CREWAI_STORAGE_DIR says
where.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from prefect_crew.api.models import CrewInput
from prefect_crew.server._real_setup import prepare_crewai, resolve_factory
from prefect_crew.server.program import Outcome, Program, ProgramError, ProgramNotFoundError, Run

__all__ = ["MAX_RUNS", "STOP_SECONDS", "RealProgram", "load_real"]

MAX_RUNS = 100
"""Runs at once. Most of a run is waiting for a model, which costs a thread and little else; a hundred runs that only
compute take no longer at once than one after another."""

STOP_SECONDS = 2.0
"""How long a stopped run's thread is waited for. The run has ended for its clients before."""

_log = logging.getLogger(__name__)


def load_real(spec: str, *, max_runs: int = MAX_RUNS) -> Program:
    """Return the program of a `module:factory`.

    It imports CrewAI and the module and builds the crew once, to learn its inputs, which takes seconds: call it before
    the event loop starts, or through `asyncio.to_thread`.

    Args:
        spec: A module that can be imported, from the current directory too, or the path of a Python file; a colon;
            and the name of a function without arguments that returns a new Crew or Flow at each call. A Flow class
            or a `@CrewBase` class is one too.
        max_runs: At most this many runs work at once; later ones wait. One that waits for a person does not count.

    Raises:
        ProgramNotFoundError: CrewAI is not installed, or there is no such module or function, or it does not build a
            fresh Crew or Flow.
    """
    prepare_crewai()
    module, factory = resolve_factory(spec)
    importlib.import_module("prefect_crew.server._real_bridge").serve_flow_questions()
    running, results = _running(), importlib.import_module("prefect_crew.server._real_results")
    try:
        first, second = running.build(factory), running.build(factory)
    except ProgramNotFoundError as error:
        raise ProgramNotFoundError(f"{spec}: {error}") from error
    except Exception as error:
        raise ProgramNotFoundError(f"{spec} failed to build its crew: {type(error).__name__}: {error}") from error
    if first is second:
        raise ProgramNotFoundError(
            f"{spec} returned the same object twice. Build a new Crew or Flow at each call: one serves one run at a "
            "time, and loses its inputs by it."
        )
    if results.share_a_model(first, second):
        _log.warning(
            "%s: a model object is shared by agents or by runs, so that token counts add up wrongly. "
            "Make one for each agent inside the function.",
            spec,
        )
    name = results.name_of(first) or module
    return RealProgram(name, factory, results.inputs_of(first), flow=results.is_flow(first), max_runs=max_runs)


class RealProgram:
    """A crew built from CrewAI code; `load_real` makes it.

    Args:
        name: What the server calls it.
        factory: Builds the Crew or Flow of one run.
        inputs: What it takes.
        flow: Whether it is a Flow.
        max_runs: At most this many runs work at once.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[[], Any],
        inputs: list[CrewInput],
        *,
        flow: bool = False,
        max_runs: int = MAX_RUNS,
    ) -> None:
        self._name = name
        self._factory = factory
        self._inputs = inputs
        self.flow = flow
        self._max_runs = max_runs
        # A semaphore belongs to one event loop, a program to none.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<RealProgram {self._name}>"

    @property
    def name(self) -> str:
        """The crew's or flow's own name, else its module's."""
        return self._name

    def inputs(self) -> list[CrewInput]:
        """Return what the crew takes, as it was when it was loaded."""
        return list(self._inputs)

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once, on a thread of its own.

        When this is cancelled, the thread ends at the crew's next model call, tool call or step: a call that is under
        way cannot be taken back, and is not waited for beyond STOP_SECONDS.

        Raises:
            ProgramError: The crew failed; the text is its own error's.
        """
        loop = asyncio.get_running_loop()
        slot = _Slot(self._slots.setdefault(loop, asyncio.Semaphore(self._max_runs)))
        await slot.take()
        bridge: Any = importlib.import_module("prefect_crew.server._real_bridge").Bridge(run, loop, slot.give_back)
        ended: asyncio.Future[Outcome | BaseException] = loop.create_future()

        def end(result: Outcome | BaseException) -> None:
            slot.give_back()
            ended.set_result(result)

        def work() -> None:
            result: Outcome | BaseException
            try:
                result = _running().run_once(self._factory, bridge)
            except BaseException as error:  # noqa: BLE001 - whatever ends the thread ends this run, not the server
                _log.debug("Run %s of %s failed.", run.id, self._name, exc_info=True)
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
                loop.call_soon_threadsafe(end, result)

        # A daemon, so that no thread of ours holds up the end of the process. Those in which CrewAI calls models do, as
        # all of asyncio's, until the call has ended or a second signal comes.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name=f"crew run {run.id}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads
            slot.give_back()
            raise
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            bridge.stop()
            # CrewAI logs tracebacks when the interpreter ends under a crew; nearly all are quicker than this.
            await asyncio.wait([ended], timeout=STOP_SECONDS)
            raise
        result = ended.result()
        if isinstance(result, BaseException):
            raise ProgramError(str(result) or type(result).__name__) from result
        return result


class _Slot:
    """One of the places for runs that work. It is given back once: by the end, or by waiting for a person.

    A run that a person has answered goes on at once, without a place: people do not answer in crowds.
    """

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._taken = False

    async def take(self) -> None:
        await self._slots.acquire()
        self._taken = True

    def give_back(self) -> None:
        if self._taken:
            self._taken = False
            self._slots.release()


def _running() -> Any:
    """Return the module that runs crews. It imports CrewAI, and is typed as what it is: not there for everyone."""
    return importlib.import_module("prefect_crew.server._real_run")
