"""Finding the crew to serve: a script's name or file, or real CrewAI code."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prefect_crew.devserver.runs import Program
from prefect_crew.devserver.scripts import CrewScript, ScriptedProgram, load_script, parse_script


def load_program(spec: str | os.PathLike[str] | CrewScript | Program, *, speed: float = 1.0) -> Program:
    """Return a crew that the server can run.

    Args:
        spec: `module:factory` for CrewAI code (extra `crewai`; see `real.load_real`), the path of a YAML file, its text
            (several lines), the name of a crew of this package such as travel, a script, or a program, which is
            returned as it is.
        speed: Of scripts; see `ScriptedProgram`.

    Raises:
        ScriptError: The script is wrong or not there.
        ProgramNotFoundError: CrewAI is not installed, or the factory is not there, or builds no crew.
    """
    if isinstance(spec, CrewScript):
        return ScriptedProgram(spec, speed=speed)
    if not isinstance(spec, (str, os.PathLike)):
        return spec
    text = os.fspath(spec)
    if isinstance(spec, str) and "\n" in text:
        return ScriptedProgram(parse_script(text), speed=speed)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", text) and not Path(text).exists():
        from prefect_crew.devserver.crewai_runner import load_real  # imports CrewAI, which takes seconds

        return load_real(text)
    return ScriptedProgram(load_script(text), speed=speed)
