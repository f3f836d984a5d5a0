"""Commands about one run of a crew: inputs, run, result, stop."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew._internal.files import check_writable, create_private
from prefect_crew.cli import _output
from prefect_crew.cli._options import (
    CREW,
    CREW_OF_RUN,
    INPUT,
    INPUT_FILE,
    JSON,
    KEY,
    OUTPUT_FILE,
    CrewAccess,
    gather_inputs,
    is_url,
    reach_for,
    wait_policy,
)
from prefect_crew.cli._output import SeenRun
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.client.models import StopOutcome
from prefect_crew.exceptions import CrewError, NotFoundError

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewInput, CrewResult, StopAnswer


def inputs(
    crew: Annotated[str, CREW], /, *, json: Annotated[bool, JSON] = False, access: CrewAccess = CrewAccess()
) -> None:
    """List the inputs that a crew takes."""
    reach_for(crew)

    async def ask() -> list[CrewInput]:
        async with await access.any_client(crew) as client:
            return await client.inputs()

    found = asyncio.run(ask())
    if json:
        _output.put_json([item.model_dump(mode="json") for item in found])
        return
    columns: dict[str, list[str]] = {
        "Input": [item.name for item in found],
        "Needed": ["required" if item.required else "optional" for item in found],
        "Default": ["" if item.default is None else str(item.default) for item in found],
        "Type": [item.type or "" for item in found],
        "Description": [item.description or "" for item in found],
    }
    columns = {name: column for name, column in columns.items() if any(column)}
    _output.put_rows([*columns], zip(*columns.values(), strict=True), empty="The crew names no inputs.")


def run(
    crew: Annotated[str, CREW],
    /,
    *,
    input_: Annotated[list[str] | None, INPUT] = None,
    inputs: Annotated[str | None, INPUT_FILE] = None,
    key: Annotated[str | None, KEY] = None,
    name: Annotated[
        str | None, Parameter(help="Step name, shown in task names and used to derive the idempotency key.")
    ] = None,
    force_new: Annotated[bool, Parameter(help="Start a new run whatever the key's record says.")] = False,
    restore_from: Annotated[str | None, Parameter(help="The id of a state of a Flow that the run starts from.")] = None,
    allow_extra: Annotated[bool, Parameter(help="Send inputs that the crew does not name, too.")] = False,
    timeout: Annotated[
        float | None, Parameter(help="Seconds that the run may take, pending and running together.")
    ] = None,
    output_file: Annotated[Path | None, OUTPUT_FILE] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Run a crew through Prefect, wait, and write its result. A second run with the same --key finds the first one."""
    given = gather_inputs(input_ or (), inputs)
    if output_file is not None:
        check_writable(output_file)
    with progress() as shown:
        reach_prefect(shown)

        async def run_it() -> CrewResult:
            from prefect_crew.flows import arun_crew

            found = replace(await access.load(crew), on_status=shown.watch)
            if allow_extra:
                found = replace(found, allow_extra_inputs=True)
            shown.phase(f"Kicking off crew {found.label}")
            return await arun_crew(
                found,
                given,
                name=name,
                idempotency_key=key,
                force_new=force_new,
                restore_from=restore_from,
                wait=None if timeout is None else wait_policy(found, timeout),
            )

        answer = asyncio.run(run_it())
    try:
        if output_file is not None:
            _write(answer, output_file)
    finally:  # a disk that has filled up does not cost the result
        put_result(answer, shown.seen, as_json=json)


def _write(answer: CrewResult, path: Path) -> None:
    try:
        create_private(path)
        path.write_text(answer.output, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def put_result(answer: CrewResult, seen: SeenRun | None, *, as_json: bool) -> None:
    """Write a result: as JSON, or its text, with where to find it on standard error."""
    page = flow_run_url(seen.flow_run_id) if seen else None
    if as_json:
        facts = {"crew": seen.label, "idempotency_key": seen.idempotency_key} if seen else {}
        if seen and seen.flow_run_id:
            facts |= {"flow_run_id": seen.flow_run_id, "flow_run_url": page}
        _output.put_json({**facts, **_plain(answer)})
        return
    blank = [""] if _output.is_terminal(sys.stdout) else []
    for line in blank:
        _output.put(line)
    _output.put_markdown(answer.output)
    figures = (
        f"Run {answer.kickoff_id}",
        None if answer.execution_time is None else f"{answer.execution_time:.1f} s",
        f"{answer.usage.total_tokens:,} tokens" if answer.usage and answer.usage.total_tokens is not None else None,
    )
    key = f"Idempotency key {seen.idempotency_key}" if seen and seen.idempotency_key else None
    for line in (*blank, " · ".join(filter(None, figures)), key, page):
        if line is not None:
            _output.note(line, "dim")


def _plain(answer: CrewResult) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})


def result(
    key: Annotated[str, Parameter(name="KEY", help="The run's idempotency key, as `runs` and the artifact show it.")],
    /,
    *,
    crew: Annotated[str | None, CREW_OF_RUN] = None,
    output_file: Annotated[Path | None, OUTPUT_FILE] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Write the whole result of a run that has completed, from its record or from the crew's server."""
    if output_file is not None:
        check_writable(output_file)
    reach_prefect()

    async def read() -> CrewResult:
        from prefect_crew.flows import get_result

        return await get_result(key, crew=None if crew is None else await access.load(crew))

    answer = asyncio.run(read())
    if output_file is not None:
        _write(answer, output_file)
    if json:
        _output.put_json({"idempotency_key": key, **_plain(answer)})
    elif output_file is None:
        _output.put_markdown(answer.output)


def stop(
    crew: Annotated[str, CREW],
    kickoff_id: Annotated[str, Parameter(name="ID", help="The kickoff id of the run.")],
    /,
    *,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Ask the crew's server to stop a run."""
    reach_for(crew)

    async def ask() -> StopAnswer:
        from prefect.settings import get_current_settings

        if is_url(crew) and not get_current_settings().api.url:  # no Prefect server is started to look for a record
            async with access.client(crew) as client:
                return await client.stop(kickoff_id)
        from prefect_crew.runs.stop import stop_run

        return await stop_run(await access.load(crew), kickoff_id)

    answer = asyncio.run(ask())
    if answer.outcome is StopOutcome.UNSUPPORTED:
        raise CrewError(f"Run {kickoff_id} runs on: the crew's server has no /stop. Its own page may offer one.")
    if answer.outcome is StopOutcome.UNKNOWN_RUN:
        said = answer.message or "the server does not know this run"
        raise NotFoundError(status_code=404, method="POST", path="/stop", message=said, kickoff_id=kickoff_id)
    has_ended = answer.state is not None and answer.state.ended
    if answer.outcome is StopOutcome.NOT_STOPPABLE and not has_ended:
        raise CrewError(f"Run {kickoff_id} was not stopped: {answer.message or 'the server gave no reason'}.")
    if json:
        _output.put_json(answer.model_dump(mode="json", exclude={"raw"}))
    elif answer.accepted:
        after = "stopped" if answer.outcome is StopOutcome.STOPPED else "asked to stop"
        _output.put(f"Run {kickoff_id}: {after}.")
    else:
        _output.put(f"Run {kickoff_id} had ended before: {answer.state}.")
