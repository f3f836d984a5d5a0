"""`run` and `result`: a crew through Prefect, and what an earlier run gave."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli import terminal
from prefect_crew.cli.crews import CREW, JSON, CrewAccess, flag
from prefect_crew.cli.exits import reason
from prefect_crew.cli.given import gather_inputs
from prefect_crew.cli.prefect_side import flow_run_url, reach_prefect
from prefect_crew.cli.progress import Progress, progress
from prefect_crew.files import check_writable, create_private

if TYPE_CHECKING:
    from prefect_crew.api.models import CrewResult
    from prefect_crew.crew import Crew
    from prefect_crew.waiting import WaitPolicy

__all__ = ["put_result", "result", "run", "wait_policy"]


def run(
    crew: Annotated[str, CREW],
    /,
    *,
    input_: Annotated[
        list[str] | None,
        Parameter(name=["--input", "-i"], help="An input, as name=value; may be given again.", negative=()),
    ] = None,
    inputs: Annotated[
        str | None, Parameter(name="--inputs", help="A file of inputs, JSON or YAML; - reads standard input.")
    ] = None,
    run_key: Annotated[
        str | None, Parameter(help="The identity of one purchase: a second run with it finds the first one again.")
    ] = None,
    name: Annotated[str | None, Parameter(help="The step's name, in task names and in a key that is left out.")] = None,
    force_new: Annotated[bool, flag("Buy a new run whatever the key's record says.")] = False,
    restore_from: Annotated[str | None, Parameter(help="The id of a state of a Flow that the run starts from.")] = None,
    allow_extra: Annotated[bool, flag("Send inputs that the crew does not name, too.")] = False,
    timeout: Annotated[
        float | None, Parameter(help="Seconds that the run may take, pending and running together.")
    ] = None,
    output_file: Annotated[Path | None, Parameter(help="Also write the result's text to this file.")] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> None:
    """Run a crew through Prefect, wait, and write its result."""
    given = gather_inputs(input_ or (), inputs)
    if output_file is not None:
        check_writable(output_file)
    with progress() as shown:
        reach_prefect(shown)
        options: dict[str, Any] = {
            "name": name,
            "run_key": run_key,
            "force_new": force_new,
            "restore_from": restore_from,
        }
        answer = asyncio.run(_run(shown, crew, access, given, timeout, allow_extra, options))
    try:
        if output_file is not None:
            _write(answer, output_file)
    finally:  # a disk that has filled up does not cost the result
        put_result(answer, shown, as_json=json)


def _write(answer: CrewResult, path: Path) -> None:
    try:
        create_private(path)
        path.write_text(answer.output, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


async def _run(
    shown: Progress,
    crew: str,
    access: CrewAccess,
    given: dict[str, Any],
    timeout: float | None,
    allow_extra: bool,
    options: dict[str, Any],
) -> CrewResult:
    from prefect_crew.runs import arun_crew
    from prefect_crew.watching import watch_runs

    found = await access.load(crew)
    if allow_extra:
        found = replace(found, allow_extra_inputs=True)
    wait = None if timeout is None else wait_policy(found, timeout)
    shown.phase(f"Kicking off crew {found.label}")
    with watch_runs(shown.watch):
        answer = await arun_crew(found, given, wait=wait, **options)
    shown.result(answer)
    return answer


def wait_policy(crew: Crew, timeout: float) -> WaitPolicy:
    """Return the crew's way to wait, with the command's timeout.

    Raises:
        ConfigurationError: It is none.
    """
    from pydantic import ValidationError

    from prefect_crew.waiting import WaitPolicy

    try:
        # Not model_copy, which checks nothing.
        return WaitPolicy.model_validate({**crew.wait.model_dump(), "timeout": timeout})
    except ValidationError as error:
        raise ConfigurationError(f"{reason(error)} Nothing was started.") from None


def put_result(answer: CrewResult, shown: Progress, *, as_json: bool) -> None:
    """Write a result: as JSON, or its text, with where it is found again on standard error."""
    board = shown.board
    page = flow_run_url(board.flow_run_id) if board else None
    if as_json:
        about: dict[str, Any] = {} if board is None else {"crew": board.label, "run_key": board.run_key}
        if board is not None and board.flow_run_id:
            about |= {"flow_run_id": board.flow_run_id, "flow_run_url": page}
        terminal.put_json({**about, **_body(answer)})
        return
    on_terminal = terminal.is_terminal(sys.stdout)
    if on_terminal:
        terminal.put()
    terminal.put_markdown(answer.output)
    tokens = answer.usage.total_tokens if answer.usage else None
    seconds = answer.execution_time
    figures = (
        f"Run {answer.kickoff_id}",
        None if seconds is None else f"{seconds:.1f} s",
        None if tokens is None else f"{tokens:,} tokens",
    )
    if on_terminal:
        terminal.note("")
    terminal.note(" · ".join(figure for figure in figures if figure), "dim")
    for line in (f"Run key {board.run_key}" if board and board.run_key else None, page):
        if line:
            terminal.note(line, "dim")


def _body(answer: CrewResult) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})


def result(
    run_key: Annotated[str, Parameter(name="RUN_KEY", help="The run's key: the artifact and `runs` show it.")],
    /,
    *,
    crew: Annotated[
        str | None, Parameter(help="The crew, where the record does not hold the result and its block is not stored.")
    ] = None,
    output_file: Annotated[Path | None, Parameter(help="Write the text to this file instead.")] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Write the whole result of a run that has completed, from its record or from the crew's server."""
    if output_file is not None:
        check_writable(output_file)
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    answer = asyncio.run(_result(run_key, crew, access))
    if json:
        terminal.put_json({"run_key": run_key, **_body(answer)})
    elif output_file is not None:
        _write(answer, output_file)
    else:
        terminal.put_markdown(answer.output)


async def _result(run_key: str, crew: str | None, access: CrewAccess) -> CrewResult:
    from prefect_crew.runs import get_result

    return await get_result(run_key, crew=None if crew is None else await access.load(crew))
