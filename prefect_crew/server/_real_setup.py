"""Getting CrewAI ready to be served, and a user's factory out of a `module:factory`.

CrewAI reads its environment when it is imported, so this comes before the first import of anything of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
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

from prefect_crew.server.program import ProgramNotFoundError

__all__ = ["prepare_crewai", "resolve_factory"]

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
