"""Commands about one run of a crew: inputs, run, status, result, resume, stop."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew._internal.files import check_writable, create_private
from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError, reason
from prefect_crew.cli._options import CREW, JSON, CrewAccess, find, flag, gather_inputs, is_url
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import Progress, progress
from prefect_crew.cli.reviews import user_name
from prefect_crew.client.models import StopOutcome
from prefect_crew.exceptions import ConfigurationError, CrewError, NotFoundError
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient
    from prefect_crew.client.models import CrewInput, CrewResult, CrewStatus, ResumeAnswer, StopAnswer
    from prefect_crew.crew import Crew, WaitPolicy


ID = Parameter(name="ID", help="The kickoff id of the run.")


async def _client(crew: str, access: CrewAccess) -> CrewClient:
    return access.client(crew) if is_url(crew) else (await access.load(crew)).client()


def inputs(
    crew: Annotated[str, CREW],
    /,
    *,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> None:
    """List the inputs that a crew takes."""
    find(crew)
    found = asyncio.run(_inputs(crew, access))
    if json:
        _output.put_json([item.model_dump(mode="json") for item in found])
        return
    rows = [
        (
            item.name,
            "required" if item.required else "optional",
            "" if item.default is None else str(item.default),
            item.type or "",
            item.description or "",
        )
        for item in found
    ]
    columns = [0, 1, *(index for index in (2, 3, 4) if any(row[index] for row in rows))]
    header = ("Input", "Needed", "Default", "Type", "Description")
    _output.put_rows(
        [header[index] for index in columns],
        [[row[index] for index in columns] for row in rows],
        empty="The crew names no inputs.",
    )


async def _inputs(crew: str, access: CrewAccess) -> list[CrewInput]:
    async with await _client(crew, access) as client:
        return await client.inputs()


def status(
    crew: Annotated[str, CREW],
    kickoff_id: Annotated[str, ID],
    /,
    *,
    output: Annotated[bool, flag("Write the whole output of a completed run.")] = False,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Show where a run stands."""
    find(crew)
    found = asyncio.run(_status(crew, kickoff_id, access))
    if found.state is CrewState.UNKNOWN:
        raise NotFoundError(
            status_code=404,
            method="GET",
            path="/status",
            message=found.message or "the server does not know this run",
            kickoff_id=kickoff_id,
        )
    if json:
        _output.put_json(found.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}}))
    elif output:
        if found.state is not CrewState.COMPLETED:
            raise CrewError(f"Run {kickoff_id} has no output: it is {found.state}.")
        _output.put_markdown(found.output or "")
    else:
        _show(found)


async def _status(crew: str, kickoff_id: str, access: CrewAccess) -> CrewStatus:
    async with await _client(crew, access) as client:
        return await client.status(kickoff_id)


def _show(found: CrewStatus) -> None:
    word = "waits for a person" if found.state is CrewState.WAITING else str(found.state)
    unheard = "" if found.known_state else f" (the server says {found.raw_state}, which counts as running)"
    _output.put(f"Run {found.kickoff_id}: {word}{unheard}")
    facts: dict[str, object] = {
        "Task": found.current_task,
        "Tasks done": f"{found.completed_tasks or 0} of {found.total_tasks}" if found.total_tasks else None,
        "Progress": None if found.progress is None or found.total_tasks else f"{found.progress:.0%}",
        "Waits on task": found.human_task_id,
        "Message": found.message if found.state is not CrewState.FAILED else None,
        "Error": found.error,
        "Execution time": None if found.execution_time is None else f"{found.execution_time:.1f} s",
        "Tokens": found.usage.total_tokens if found.usage else None,
    }
    for name, fact in facts.items():
        if fact not in (None, ""):
            _output.put(f"{name}: {' '.join(str(fact).split())}")
    if found.state is CrewState.COMPLETED:
        _output.put("")
        _output.put_markdown(found.output or "")


def _without_prefect(crew: str) -> bool:
    """Return whether a command has to do without records: no Prefect server is started to look for one."""
    from prefect.settings import get_current_settings

    return is_url(crew) and not get_current_settings().api.url


def resume(
    crew: Annotated[str, CREW],
    kickoff_id: Annotated[str, ID],
    /,
    *,
    approve: Annotated[bool, flag("Accept the output that the crew shows.")] = False,
    reject: Annotated[bool, flag("Have the task done again, with the feedback.")] = False,
    feedback: Annotated[str, Parameter(help="What the crew is told.")] = "",
    task_id: Annotated[str | None, Parameter(help="The task, where the status does not name it.")] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Answer for the person that a run waits for."""
    if approve == reject:
        raise UsageError("Say either --approve or --reject.")
    find(crew)
    answer = asyncio.run(_resume(crew, kickoff_id, access, feedback, approve=approve, task_id=task_id))
    if json:
        _output.put_json(answer.model_dump(mode="json", exclude={"raw"}))
        return
    said = ": ".join(part for part in (answer.status, answer.message) if part)
    _output.put(f"Run {kickoff_id}: {'approved' if approve else 'rejected'}{f' ({said})' if said else ''}.")


async def _resume(
    crew: str, kickoff_id: str, access: CrewAccess, feedback: str, *, approve: bool, task_id: str | None
) -> ResumeAnswer:
    from prefect_crew.runs.actions import resume_run
    from prefect_crew.runs.run import OpenRun

    answer: dict[str, Any] = {"feedback": feedback, "approve": approve, "task_id": task_id, "by": user_name()}
    found = await access.load(crew)
    if _without_prefect(crew):
        # Nothing outlasts this command that could know of the answer, so no Prefect server is started for it.
        return await resume_run(found, kickoff_id, run=OpenRun(found, kickoff_id), records=None, **answer)
    return await resume_run(found, kickoff_id, **answer)


def stop(
    crew: Annotated[str, CREW],
    kickoff_id: Annotated[str, ID],
    /,
    *,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Ask the crew's server to stop a run."""
    find(crew)
    answer = asyncio.run(_stop(crew, kickoff_id, access))
    if answer.outcome is StopOutcome.UNSUPPORTED:
        raise CrewError(f"Run {kickoff_id} runs on: the crew's server has no /stop. Its own page may offer one.")
    if answer.outcome is StopOutcome.UNKNOWN_RUN:
        raise NotFoundError(
            status_code=404,
            method="POST",
            path="/stop",
            message=answer.message or "the server does not know this run",
            kickoff_id=kickoff_id,
        )
    ended = answer.state is not None and answer.state.ended
    if answer.outcome is StopOutcome.NOT_STOPPABLE and not ended:
        raise CrewError(f"Run {kickoff_id} was not stopped: {answer.message or 'the server gave no reason'}.")
    if json:
        _output.put_json(answer.model_dump(mode="json", exclude={"raw"}))
    elif answer.accepted:
        after = "stopped" if answer.outcome is StopOutcome.STOPPED else "asked to stop"
        _output.put(f"Run {kickoff_id}: {after}.")
    else:
        _output.put(f"Run {kickoff_id} had ended before: {answer.state}.")


async def _stop(crew: str, kickoff_id: str, access: CrewAccess) -> StopAnswer:
    if _without_prefect(crew):
        async with access.client(crew) as client:
            return await client.stop(kickoff_id)
    from prefect_crew.runs.actions import stop_run

    return await stop_run(await access.load(crew), kickoff_id)


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
    idempotency_key: Annotated[
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
            "idempotency_key": idempotency_key,
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
    from prefect_crew.flows import arun_crew
    from prefect_crew.runs.progress import watch_runs

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

    from prefect_crew.crew import WaitPolicy

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
        about: dict[str, Any] = {} if board is None else {"crew": board.label, "idempotency_key": board.idempotency_key}
        if board is not None and board.flow_run_id:
            about |= {"flow_run_id": board.flow_run_id, "flow_run_url": page}
        _output.put_json({**about, **_body(answer)})
        return
    on_terminal = _output.is_terminal(sys.stdout)
    if on_terminal:
        _output.put()
    _output.put_markdown(answer.output)
    tokens = answer.usage.total_tokens if answer.usage else None
    seconds = answer.execution_time
    figures = (
        f"Run {answer.kickoff_id}",
        None if seconds is None else f"{seconds:.1f} s",
        None if tokens is None else f"{tokens:,} tokens",
    )
    if on_terminal:
        _output.note("")
    _output.note(" · ".join(figure for figure in figures if figure), "dim")
    for line in (f"Idempotency key {board.idempotency_key}" if board and board.idempotency_key else None, page):
        if line:
            _output.note(line, "dim")


def _body(answer: CrewResult) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})


def result(
    idempotency_key: Annotated[str, Parameter(name="KEY", help="The run's key: the artifact and `runs` show it.")],
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
    answer = asyncio.run(_result(idempotency_key, crew, access))
    if json:
        _output.put_json({"idempotency_key": idempotency_key, **_body(answer)})
    elif output_file is not None:
        _write(answer, output_file)
    else:
        _output.put_markdown(answer.output)


async def _result(idempotency_key: str, crew: str | None, access: CrewAccess) -> CrewResult:
    from prefect_crew.flows import get_result

    return await get_result(idempotency_key, crew=None if crew is None else await access.load(crew))
