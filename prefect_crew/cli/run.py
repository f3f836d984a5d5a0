"""Commands about the runs of a crew: inputs, run, result."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._options import (
    CrewName,
    CrewOfRun,
    InputFile,
    Inputs,
    Key,
    Output,
    Yes,
    gather_inputs,
    is_url,
    load,
    open_client,
)
from prefect_crew.cli._output import Progress, SeenRun
from prefect_crew.cli._prefect import page_url, reach_prefect
from prefect_crew.prices import money

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewInput, CrewResult


def inputs(crew: CrewName, /, *, output: Output = None) -> None:
    """List the inputs that a crew takes."""
    if not is_url(crew):
        reach_prefect()

    async def ask() -> list[CrewInput]:
        async with await open_client(crew) as client:
            return await client.inputs()

    crew_inputs = asyncio.run(ask())
    columns: dict[str, list[str]] = {
        "Input": [item.name for item in crew_inputs],
        "Needed": ["required" if item.required else "optional" for item in crew_inputs],
        "Default": ["" if item.default is None else str(item.default) for item in crew_inputs],
        "Type": [item.type or "" for item in crew_inputs],
        "Description": [item.description or "" for item in crew_inputs],
    }
    columns = {name: column for name, column in columns.items() if any(column)}
    as_json = output and [item.model_dump(mode="json") for item in crew_inputs]
    rows = zip(*columns.values(), strict=True)
    _output.put_rows([*columns], rows, empty="The crew names no inputs.", json=as_json)


def run(
    crew: CrewName,
    /,
    *,
    inputs: Inputs = None,
    input_file: InputFile = None,
    key: Key = None,
    name: str | None = None,
    force_new: bool = False,
    restore_from: str | None = None,
    session: str | None = None,
    timeout: float | None = None,
    yes: Yes = False,
    output: Output = None,
) -> Coroutine[Any, Any, None]:
    """Run a crew through Prefect, wait, and write its result. A second call with the same --key finds the first run.

    Args:
        name: A name for the run, shown in task names. Without --key, it is part of the idempotency key.
        force_new: Start a new run even if the key has one.
        restore_from: The id of a saved state of a CrewAI Flow, from which the run starts.
        session: A session of a CrewAI Flow: the run starts from the state of the session's last completed run.
        timeout: Seconds that a run may take, pending and running together.
    """
    values = gather_inputs(inputs, input_file)
    if force_new:
        _output.confirm("--force-new starts a new run, even if one with this key is in flight. Go on?", yes=yes)

    async def run_it() -> None:
        from prefect_crew.crew import WaitPolicy
        from prefect_crew.flows import run_loaded_crew
        from prefect_crew.runs.request import RunOptions

        progress = Progress()
        loaded_crew = replace(await load(crew), on_status=progress.watch)
        turn = "" if session is None else f", and waiting for its turn in session {session!r}"
        _output.note(f"Crew {loaded_crew.label}: checking the inputs, looking for a run of this key{turn} …")
        wait = None if timeout is None else {**dict(loaded_crew.wait), "timeout": timeout}
        options = RunOptions.of(
            name=name,
            idempotency_key=key,
            force_new=force_new,
            restore_from=restore_from,
            session=session,
            wait=wait and WaitPolicy.model_validate(wait),
        )
        answer = await run_loaded_crew(loaded_crew, values, options)
        put_result(answer, progress.seen, as_json=output is not None)

    return run_it()


def put_result(answer: CrewResult, watched: SeenRun | None, *, as_json: bool) -> None:
    """Write a result: as JSON, or its text, with where to find it on standard error."""
    flow_run_id = watched.flow_run_id if watched else None
    page = page_url(flow_run_id)
    if as_json:
        where = {"crew": watched and watched.label, "flow_run_id": flow_run_id, "flow_run_url": page}
        _output.put_json({**where, **_plain(answer)})
        return
    _output.put_markdown(answer.output)
    figures = (
        f"Run {answer.kickoff_id}",
        None if answer.execution_time is None else f"{answer.execution_time:.1f} s",
        f"{answer.usage.total_tokens:,} tokens" if answer.usage and answer.usage.total_tokens is not None else None,
        f"cost {money(answer.cost)}" if answer.cost is not None else None,
    )
    key = answer.idempotency_key and f"Idempotency key {answer.idempotency_key}"
    for line in filter(None, (" · ".join(filter(None, figures)), key, page)):
        _output.note(line, "dim")


def _plain(answer: CrewResult) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})


async def result(
    key: Annotated[str, Parameter(name="KEY", help="The run's idempotency key, or its kickoff id.")],
    /,
    *,
    output: Output = None,
    crew: CrewOfRun = None,
) -> None:
    """Write the whole result of a run that has completed, from the crew database or from the crew's server."""
    from prefect_crew.flows import aget_result

    loaded_crew: Any = None if crew is None else await load(crew)
    answer = await aget_result(key, crew=loaded_crew)
    if output:
        _output.put_json(_plain(answer))
    else:
        _output.put_markdown(answer.output)
