"""What asks a crew's server one thing: inputs, status, resume, stop. With a URL none of it needs a Prefect server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.api.errors import CrewError, NotFoundError
from prefect_crew.api.models import CrewState, StopOutcome
from prefect_crew.cli import terminal
from prefect_crew.cli.crews import CREW, JSON, CrewAccess, find, flag, is_url
from prefect_crew.cli.exits import UsageError
from prefect_crew.cli.reviews import user_name

if TYPE_CHECKING:
    from prefect_crew.api.client import CrewClient
    from prefect_crew.api.models import CrewInput, CrewStatus, ResumeAnswer, StopAnswer

__all__ = ["inputs", "resume", "status", "stop"]

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
        terminal.put_json([item.model_dump(mode="json") for item in found])
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
    terminal.put_rows(
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
        terminal.put_json(found.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}}))
    elif output:
        if found.state is not CrewState.COMPLETED:
            raise CrewError(f"Run {kickoff_id} has no output: it is {found.state}.")
        terminal.put_markdown(found.output or "")
    else:
        _show(found)


async def _status(crew: str, kickoff_id: str, access: CrewAccess) -> CrewStatus:
    async with await _client(crew, access) as client:
        return await client.status(kickoff_id)


def _show(found: CrewStatus) -> None:
    word = "waits for a person" if found.state is CrewState.WAITING else str(found.state)
    unheard = "" if found.known_state else f" (the server says {found.raw_state}, which counts as running)"
    terminal.put(f"Run {found.kickoff_id}: {word}{unheard}")
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
            terminal.put(f"{name}: {' '.join(str(fact).split())}")
    if found.state is CrewState.COMPLETED:
        terminal.put("")
        terminal.put_markdown(found.output or "")


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
        terminal.put_json(answer.model_dump(mode="json", exclude={"raw"}))
        return
    said = ": ".join(part for part in (answer.status, answer.message) if part)
    terminal.put(f"Run {kickoff_id}: {'approved' if approve else 'rejected'}{f' ({said})' if said else ''}.")


async def _resume(
    crew: str, kickoff_id: str, access: CrewAccess, feedback: str, *, approve: bool, task_id: str | None
) -> ResumeAnswer:
    from prefect_crew.actions import resume_run
    from prefect_crew.open_runs import OpenRun

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
        terminal.put_json(answer.model_dump(mode="json", exclude={"raw"}))
    elif answer.accepted:
        after = "stopped" if answer.outcome is StopOutcome.STOPPED else "asked to stop"
        terminal.put(f"Run {kickoff_id}: {after}.")
    else:
        terminal.put(f"Run {kickoff_id} had ended before: {answer.state}.")


async def _stop(crew: str, kickoff_id: str, access: CrewAccess) -> StopAnswer:
    if _without_prefect(crew):
        async with access.client(crew) as client:
            return await client.stop(kickoff_id)
    from prefect_crew.actions import stop_run

    return await stop_run(await access.load(crew), kickoff_id)
