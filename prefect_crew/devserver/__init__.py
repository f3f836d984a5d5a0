"""A crew server on your own machine: scripted crews or real CrewAI code behind the API that a deployed crew speaks.

    from prefect_crew.devserver import CrewServer

    with CrewServer("travel") as server:
        ...  # server.url, server.token

The names are loaded when they are first used: programs need only `prefect_crew.devserver.runs`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_crew.devserver.app import create_app
    from prefect_crew.devserver.faults import Fault, FaultError, Faults
    from prefect_crew.devserver.programs import load_program
    from prefect_crew.devserver.runs import ProgramNotFoundError
    from prefect_crew.devserver.scripts import CrewScript, ScriptError, load_script
    from prefect_crew.devserver.server import CrewServer, InProcessCrewServer

__all__ = [
    "CrewScript",
    "CrewServer",
    "Fault",
    "FaultError",
    "Faults",
    "InProcessCrewServer",
    "ProgramNotFoundError",
    "ScriptError",
    "create_app",
    "load_program",
    "load_script",
]

_HOMES = {
    "CrewScript": "scripts",
    "CrewServer": "server",
    "Fault": "faults",
    "FaultError": "faults",
    "Faults": "faults",
    "InProcessCrewServer": "server",
    "ProgramNotFoundError": "runs",
    "ScriptError": "scripts",
    "create_app": "app",
    "load_program": "programs",
    "load_script": "scripts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
