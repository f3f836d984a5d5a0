"""CrewAI code: how it is found and loaded, without importing CrewAI before it is needed."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect_crew.devserver._runs import Program, ProgramNotFoundError

_ENVIRONMENT = {
    "CREWAI_DISABLE_TELEMETRY": "true",  # it waits 10 s at exit where there is no network
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
}

_ROOM = 2**30
"""Bytes that memory has to have free to be a place for what crews keep. In a container it may have 64 MiB in all."""


def prepare_crewai() -> None:
    """Set CrewAI's environment as far as the user has not, before it is imported.

    Crews keep what they write (task outputs, memory, paused flows) in a directory that is removed with this process,
    and is in memory where there is room; set CREWAI_STORAGE_DIR to keep it.

    Raises:
        ProgramNotFoundError: CrewAI is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("CREWAI_STORAGE_DIR"):
        # In memory where there is room: CrewAI syncs each output of a task to one SQLite file, and other runs wait.
        memory = Path("/dev/shm")  # noqa: S108  mkdtemp makes a directory of its own
        is_roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM
        storage = tempfile.mkdtemp(prefix="prefect-crew-", dir=memory if is_roomy else None)
        os.environ["CREWAI_STORAGE_DIR"] = storage
        atexit.register(shutil.rmtree, storage, ignore_errors=True)
    if importlib.util.find_spec("crewai") is None:
        raise ProgramNotFoundError(
            "Serving CrewAI code needs CrewAI: pip install 'prefect-crew[crewai]', with Python below 3.14. "
            f"This is Python {sys.version_info.major}.{sys.version_info.minor}."
        )


def load_crewai(spec: str) -> Program:
    """Return the program of a `module:factory`.

    It imports CrewAI and the module and builds the crew, to learn its inputs, which takes seconds.

    Args:
        spec: A module that can be imported, from the current directory too, or the path of a Python file; a colon;
            and the name of a function without arguments that returns a new Crew or Flow at each call.

    Raises:
        ProgramNotFoundError: CrewAI or the function is not there, or it does not build a fresh Crew or Flow.
    """
    prepare_crewai()
    path, _, name = spec.rpartition(":")
    try:
        if path.endswith(".py"):
            module = _import_file(Path(path))
        else:
            _add_to_path(Path.cwd() / "src")  # where `crewai create crew` puts it
            _add_to_path(Path.cwd())
            module = importlib.import_module(path)
        factory: Callable[[], Any] = attrgetter(name)(module)  # a name with dots is a function of a class
    except (Exception, SystemExit) as error:
        raise ProgramNotFoundError(f"{spec} cannot be loaded: {type(error).__name__}: {error}") from error
    # It imports CrewAI, which not everyone has, so it is not typed here.
    programs: Any = importlib.import_module("prefect_crew.devserver._crewai")
    try:
        return programs.CrewAIProgram(factory, path.removesuffix(".py").replace("/", ".").rpartition(".")[2])
    except Exception as error:
        raise ProgramNotFoundError(
            f"{spec} failed to build its crew: {type(error).__name__}: {error}. Name a function without arguments that "
            "returns a new Crew or Flow at each call, since each serves one run at a time."
        ) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file, as a module of its package where it is in one."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    folder, name = path.parent, path.stem
    _add_to_path(folder)
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    _add_to_path(folder)
    module = importlib.import_module(name)
    if getattr(module, "__file__", None) != str(path):
        raise ImportError(
            f"this process has loaded another {name}; rename the file, or serve it in a process of its own"
        )
    return module


def _add_to_path(directory: Path) -> None:
    """Let modules in a directory be imported, now and while crews run."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
