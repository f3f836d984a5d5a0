"""A crew server on your own machine: scripted crews or CrewAI code behind the API that a deployed crew has.

from prefect_crew.devserver import CrewServer

with CrewServer("travel") as server:
    ...  # server.url, server.token
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_crew._internal.lazy import lazy_names

if TYPE_CHECKING:
    from prefect_crew.devserver._faults import Fault, Faults
    from prefect_crew.devserver._runs import Answer, Outcome, Program, ProgramError, ProgramNotFoundError, Run
    from prefect_crew.devserver._scripts import CrewScript, load_program, load_script
    from prefect_crew.devserver._server import CrewServer

__all__ = [
    "Answer", "CrewScript", "CrewServer", "Fault", "Faults", "Outcome", "Program", "ProgramError",
    "ProgramNotFoundError", "Run", "load_program", "load_script",
]  # fmt: skip

# Loaded when first used: uvicorn and Starlette take 0.2 s to import.
_NAMES = {
    "_faults": "Fault Faults",
    "_runs": "Answer Outcome Program ProgramError ProgramNotFoundError Run",
    "_scripts": "CrewScript load_program load_script",
    "_server": "CrewServer",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
