"""Real CrewAI code as a program of the dev server: loaded, prepared, and run on threads."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver.runs import Outcome, Program, ProgramError, ProgramNotFoundError, Run

_ENVIRONMENT = {
    "CREWAI_DISABLE_TELEMETRY": "true",  # it waits 10 s at exit where there is no network
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
}
_STORAGE = "CREWAI_STORAGE_DIR"

_preparing = threading.Lock()
_locks: dict[str, threading.Lock] = {}


def prepare_crewai() -> None:
    """Set CrewAI's environment as far as the user has not, and import it.

    The first call takes seconds; later ones nothing. Crews keep what they write (task outputs, memory, paused flows)
    in a directory of this process, which goes with it; set CREWAI_STORAGE_DIR to keep it.

    Raises:
        ProgramNotFoundError: CrewAI is not installed.
    """
    with _preparing:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if private := not os.environ.get(_STORAGE):
            os.environ[_STORAGE] = storage = tempfile.mkdtemp(prefix="prefect-crew-")
            atexit.register(shutil.rmtree, storage, ignore_errors=True)
        try:
            importlib.import_module("crewai")
        except ModuleNotFoundError as error:
            if error.name != "crewai":
                raise
            raise ProgramNotFoundError(_not_installed()) from error
        if private:
            # CrewAI's own locks are files that are polled, for processes that share a storage. Nobody shares this one,
            # and a hundred runs that wait for a file's lock take three times as long.
            importlib.import_module("crewai_core.lock_store").set_lock_backend(_lock_in_process)


def resolve_factory(spec: str) -> tuple[str, Callable[[], Any]]:
    """Return the module's last name and the factory that a `module:factory` means.

    The module is a dotted name, importable from the current directory as well, or the path of a file; what lies
    beside that file can be imported from it.

    Raises:
        ProgramNotFoundError: It cannot be read as one, the module cannot be imported, or has no such callable.
    """
    path, colon, name = spec.rpartition(":")
    if not (colon and path and name):
        raise ProgramNotFoundError(
            f"{spec!r} is not a module:factory. Say which function builds the crew: travel_crew:build, or "
            "examples/travel_crew.py:build."
        )
    try:
        module = _import_file(Path(path)) if path.endswith(".py") else _import_module(path)
    except ProgramNotFoundError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ProgramNotFoundError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    try:
        factory: Any = attrgetter(name)(module)  # a name with dots is a function of a class
    except AttributeError:
        factory, wrong = None, "does not exist"
    else:
        wrong = "is not a function"
    if not callable(factory):
        raise ProgramNotFoundError(
            f"{name!r} of {path} {wrong}. Name a function without arguments that returns a new Crew or Flow at each "
            f"call, since each serves one run at a time."
        )
    return path.removesuffix(".py").replace("/", ".").rpartition(".")[2], factory


def _import_module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ProgramNotFoundError(f"There is no file {path}.")
    _look_in(path.parent)
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    # A file may be called like a module that is already there, such as crew.py or main.py.
    name = path.stem if known is None else f"{path.stem}@{path}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProgramNotFoundError(f"{path} is not a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(directory: Path) -> None:
    """Let modules in a directory be imported, now and while crews run."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


@contextlib.contextmanager
def _lock_in_process(name: str, *, timeout: float = 120.0) -> Generator[None, None, None]:
    lock = _locks.setdefault(name, threading.Lock())
    if not lock.acquire(timeout=timeout):
        raise TimeoutError(f"CrewAI's lock {name!r} was not free within {timeout:g} s.")
    try:
        yield
    finally:
        lock.release()


def _not_installed() -> str:
    advice = "Serving CrewAI code needs CrewAI: pip install 'prefect-crew[crewai]', with Python below 3.14."
    if sys.version_info >= (3, 14):
        return f"{advice} This is Python {sys.version_info.major}.{sys.version_info.minor}."
    return advice


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
    importlib.import_module("prefect_crew.devserver.crewai_bridge").serve_flow_questions()
    running, results = _running(), importlib.import_module("prefect_crew.devserver.crewai_bridge")
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
        bridge: Any = importlib.import_module("prefect_crew.devserver.crewai_bridge").Bridge(run, loop, slot.give_back)
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
    return importlib.import_module("prefect_crew.devserver.crewai_bridge")
