"""CrewAI code as a program of the dev server: how it is found, loaded, and run on threads."""

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
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver._runs import Outcome, Program, ProgramError, ProgramNotFoundError, Run

_ENVIRONMENT = {
    "CREWAI_DISABLE_TELEMETRY": "true",  # it waits 10 s at exit where there is no network
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
}

MAX_RUNS = 100
"""Runs at once by default; each needs a thread."""

STOP_SECONDS = 2.0
"""How long a stopped run's thread is waited for. For its clients the run has ended before."""

_log = logging.getLogger(__name__)


def prepare_crewai() -> None:
    """Set CrewAI's environment as far as the user has not, and import it.

    The first call takes seconds, later ones nothing. Crews keep what they write (task outputs, memory, paused flows)
    in a directory that is removed with this process; set CREWAI_STORAGE_DIR to keep it.

    Raises:
        ProgramNotFoundError: CrewAI is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("CREWAI_STORAGE_DIR"):
        os.environ["CREWAI_STORAGE_DIR"] = storage = tempfile.mkdtemp(prefix="prefect-crew-")
        atexit.register(shutil.rmtree, storage, ignore_errors=True)
    try:
        importlib.import_module("crewai")
    except ModuleNotFoundError as error:
        if error.name != "crewai":
            raise
        raise ProgramNotFoundError(
            "Serving CrewAI code needs CrewAI: pip install 'prefect-crew[crewai]', with Python below 3.14. "
            f"This is Python {sys.version_info.major}.{sys.version_info.minor}."
        ) from error


def load_crewai(spec: str) -> Program:
    """Return the program of a `module:factory`.

    It imports CrewAI and the module and builds the crew once, to learn its inputs, which takes seconds.

    Args:
        spec: A module that can be imported, from the current directory too, or the path of a Python file; a colon;
            and the name of a function without arguments that returns a new Crew or Flow at each call. A Flow class
            or a `@CrewBase` class is one too.

    Raises:
        ProgramNotFoundError: CrewAI is not installed, or there is no such module or function, or it does not build a
            fresh Crew or Flow.
    """
    prepare_crewai()
    module, factory = _find_factory(spec)
    bridge = _bridge()
    bridge.register_feedback_provider()
    try:
        first, second = bridge.build(factory), bridge.build(factory)
    except ProgramNotFoundError as error:
        raise ProgramNotFoundError(f"{spec}: {error}") from error
    except Exception as error:
        raise ProgramNotFoundError(f"{spec} failed to build its crew: {type(error).__name__}: {error}") from error
    if first is second:
        raise ProgramNotFoundError(
            f"{spec} returned the same object twice. Build a new Crew or Flow at each call: one serves one run at a "
            "time, and loses its inputs by it."
        )
    return CrewAIProgram(bridge.name_of(first) or module, factory, bridge.inputs_of(first), flow=bridge.is_flow(first))


def _bridge() -> Any:
    """Return the module that runs crews. It imports CrewAI, which not everyone has, so it is not typed."""
    return importlib.import_module("prefect_crew.devserver._crewai_bridge")


def _find_factory(spec: str) -> tuple[str, Callable[[], Any]]:
    """Return the module's last name and the factory that a `module:factory` means."""
    path, _, name = spec.rpartition(":")
    try:
        if path.endswith(".py"):
            module = _import_file(Path(path))
        else:
            _add_to_path(Path.cwd() / "src")  # where `crewai create crew` puts it
            _add_to_path(Path.cwd())
            module = importlib.import_module(path)
    except ProgramNotFoundError:
        raise
    except (Exception, SystemExit) as error:
        raise ProgramNotFoundError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    problem, factory = "is not a function", None
    try:
        factory = attrgetter(name)(module)  # a name with dots is a function of a class
    except AttributeError:
        problem = "does not exist"
    if not callable(factory):
        raise ProgramNotFoundError(
            f"{name!r} of {path} {problem}. Name a function without arguments that returns a new Crew or Flow at each "
            "call, since each serves one run at a time."
        )
    return path.removesuffix(".py").replace("/", ".").rpartition(".")[2], factory


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ProgramNotFoundError(f"There is no file {path}.")
    folder, package = path.parent, list[str]()
    _add_to_path(folder)
    while (folder / "__init__.py").is_file():
        folder, package = folder.parent, [folder.name, *package]
    if package:
        _add_to_path(folder)
        module = importlib.import_module(".".join([*package, path.stem]))
        if (other := getattr(module, "__file__", None)) is None or Path(other).resolve() != path:
            raise ProgramNotFoundError(
                f"{path} cannot be served: this process has loaded {module.__name__} from {other}. Serve it in a "
                "process of its own, or rename its package."
            )
        return module
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # A file may be called like a module that is already loaded, such as crew.py or main.py.
    name = path.stem if loaded is None else f"{path.stem}@{path}"
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


def _add_to_path(directory: Path) -> None:
    """Let modules in a directory be imported, now and while crews run."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


class CrewAIProgram:
    """A crew built from CrewAI code; `load_crewai` makes it."""

    max_runs = MAX_RUNS

    def __init__(self, name: str, factory: Callable[[], Any], inputs: list[CrewInput], *, flow: bool) -> None:
        self.name = name
        self.flow = flow
        self._factory = factory
        self._inputs = inputs

    def __repr__(self) -> str:
        return f"<CrewAIProgram {self.name}>"

    def inputs(self) -> list[CrewInput]:
        """Return what the crew takes, as it was when it was loaded."""
        return list(self._inputs)

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once, on a thread of its own.

        When this is cancelled, the thread ends at the crew's next model call, tool call or step. A call that is under
        way cannot be taken back, and is not waited for beyond STOP_SECONDS.

        Raises:
            ProgramError: The crew failed; the text is its own error's.
        """
        loop = asyncio.get_running_loop()
        bridge: Any = _bridge().Bridge(run, loop)
        ended: asyncio.Future[Outcome | BaseException] = loop.create_future()

        def work() -> None:
            result: Outcome | BaseException
            try:
                result = _bridge().run_once(self._factory, bridge)
            except BaseException as error:  # noqa: BLE001 - whatever ends the thread ends this run, not the server
                _log.debug("Run %s of %s failed.", run.id, self.name, exc_info=True)
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(ended.set_result, result)

        # A daemon, so that no thread of ours delays the end of the process.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), name=f"crew run {run.id}", daemon=True).start()
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
