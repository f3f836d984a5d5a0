"""A crew server on your own machine: scripted crews or real CrewAI code behind the API that a deployed crew speaks.

    from prefect_crew.server import CrewServer

    with CrewServer("travel") as server:
        ...  # server.url, server.token

The names are loaded when they are first used: programs need only `prefect_crew.server.program`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_crew.server.app import create_app
    from prefect_crew.server.faults import Fault, FaultError, Faults
    from prefect_crew.server.local import CrewServer, InProcessCrewServer
    from prefect_crew.server.program import ProgramNotFoundError
    from prefect_crew.server.programs import load_program
    from prefect_crew.server.scripted import CrewScript
    from prefect_crew.server.scripts import ScriptError, load_script

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
    "CrewScript": "scripted",
    "CrewServer": "local",
    "Fault": "faults",
    "FaultError": "faults",
    "Faults": "faults",
    "InProcessCrewServer": "local",
    "ProgramNotFoundError": "program",
    "ScriptError": "scripts",
    "create_app": "app",
    "load_program": "programs",
    "load_script": "scripts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
