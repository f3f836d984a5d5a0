"""Commands that create deployments and their flow runs."""

from __future__ import annotations

import asyncio
import json
import shlex
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, validators
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.settings import get_current_settings

from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.cli._options import CrewAccess, InputFile, Inputs, Key, Output, Pool, gather_inputs, is_url, read_text
from prefect_crew.cli._prefect import page_url, reach_prefect
from prefect_crew.deployments import (
    Target,
    build_deployment,
    crew_target,
    describe_schedule,
    flow_target,
    pipeline_target,
    shared_key,
)
from prefect_crew.deployments import backfill as create_runs
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.pipelines.definition import read_pipeline

WHAT = Group("What to deploy, one of", validator=validators.LimitedChoice(1, 1), sort_key=0)
WHEN = Group("When it runs, one of", validator=validators.MutuallyExclusive(), sort_key=1)


def deploy(
    crew: Annotated[str | None, Parameter(name="CREW", group=WHAT)] = None,
    /,
    *,
    pipeline: Annotated[Path | None, Parameter(group=WHAT)] = None,
    flow: Annotated[str | None, Parameter(group=WHAT)] = None,
    pool: Pool = None,
    cron: Annotated[str | None, Parameter(group=WHEN)] = None,
    interval: Annotated[float | None, Parameter(group=WHEN)] = None,
    timezone: str | None = None,
    name: str | None = None,
    inputs: Inputs = None,
    input_file: InputFile = None,
    key: Key = None,
    concurrency_limit: int | None = None,
    tag: Annotated[list[str] | None, Parameter(name=["--tag", "-t"])] = None,
) -> None:
    """Deploy a crew, a pipeline or a flow.

    Args:
        crew: The name of a stored crew.
        pipeline: A file with a pipeline, YAML or JSON.
        flow: The import path of an asynchronous flow, my_package.flows.my_flow.
        pool: The work pool whose workers run it, with this package installed; if left out, Prefect's default one.
        cron: A cron schedule. Each required input then needs a default.
        interval: A schedule: the seconds between two runs.
        timezone: The schedule's time zone, such as Europe/Lisbon.
        name: The deployment's name; that of the crew or pipeline if left out.
        concurrency_limit: How many of its flow runs may go on at once.
        tag: A tag; can be repeated.
    """
    if crew is not None and is_url(crew):
        raise ConfigurationError(
            "A deployment needs a stored crew, whose token its runs can load: prefect-crew crews save NAME --url "
            f"{shlex.quote(crew)}, then prefect-crew deploy NAME."
        )
    if flow is not None and key is not None:
        raise ConfigurationError("--key is for crews and pipelines. Give a flow its own parameter with -i.")
    if timezone and cron is None and interval is None:
        raise ConfigurationError("--timezone is that of a schedule: give --cron or --interval too.")
    defaults = gather_inputs(inputs, input_file)
    reach_prefect(lasting=True)
    schedule = _schedule(cron, interval, timezone)

    async def make() -> tuple[Target, RunnerDeployment, str, str | None, list[str]]:
        if flow is not None:
            target, own_name = flow_target(flow, defaults), flow.rpartition(".")[2]
        elif pipeline is not None:
            definition = read_pipeline(read_text(pipeline, "pipeline"), str(pipeline))
            target, own_name = await pipeline_target(definition, defaults), definition.name
        else:
            own_name = crew or ""
            target = await crew_target(await CrewAccess().load(own_name), defaults)
        full_name = f"{target.form.name}/{name or own_name}"
        deployment = build_deployment(
            target,
            name or own_name,
            idempotency_key=key,
            schedule=schedule,
            has_schedule=bool(await _schedules(full_name)),
            tags=tag or (),
            work_pool_name=pool or get_current_settings().deployments.default_work_pool_name,
            concurrency_limit=concurrency_limit,
        )
        deployment_id, pool_type = await apply_deployment(deployment)
        when = [await describe_schedule(one.schedule) for one in await _schedules(full_name) if one.active]
        return target, deployment, deployment_id, pool_type, when

    target, deployment, deployment_id, pool_type, when = asyncio.run(make())
    _output.put(f"Deployed {deployment.full_name}, which asks for {', '.join(target.asks) or 'nothing'}.")
    if page := page_url(deployment_id, "deployment"):
        _output.put(page)
    for line in when:
        _output.put(f"{'Its earlier schedule stays' if schedule is None else 'Its schedule'}: {line}")
    if flow is not None:
        given = "".join(f" -p {name}=…" for name in target.needed)
    else:
        given = json.dumps(dict.fromkeys(target.needed, "…"), ensure_ascii=False)
        given = f" -p {shlex.quote(f'inputs={given}')}" if target.needed else ""
    _output.put(f"Run it: prefect deployment run {shlex.quote(deployment.full_name)}{given}")
    if deployment.work_pool_name:
        _output.put(f"Its runs need a worker: prefect worker start --pool {shlex.quote(deployment.work_pool_name)}")
    else:
        _output.put("Nothing runs it yet. Deploy it again with --pool POOL.")
    if flow is not None and pool_type == "crew" and not flow.startswith("prefect_crew."):
        module = shlex.quote(flow.rpartition(".")[0])
        _output.put(f"Its workers have to allow the module: PREFECT_INTEGRATIONS_CREW_WORKER_MODULES={module}")


def _schedule(cron: str | None, interval: float | None, timezone: str | None) -> Schedule | None:
    try:
        if cron is not None:
            return Cron(cron, timezone=timezone)
        return None if interval is None else Interval(timedelta(seconds=interval), timezone=timezone)
    except ValueError as error:
        raise ConfigurationError(f"The schedule cannot be made: {reason(error)}") from None


async def _schedules(full_name: str) -> list[DeploymentSchedule]:
    async with get_client() as client:
        try:
            return (await client.read_deployment_by_name(full_name)).schedules
        except ObjectNotFound:
            return []


async def apply_deployment(deployment: RunnerDeployment) -> tuple[str, str | None]:
    """Store a deployment; return its id and the type of its work pool."""
    if again := await shared_key(deployment):
        _output.note(f"Several times of the schedule share the key {again!r}: only the first of them starts a run.")
    pool_type: str | None = None
    try:
        if deployment.work_pool_name:
            async with get_client() as client:
                pool_type = (await client.read_work_pool(deployment.work_pool_name)).type
        return str(await deployment.aapply()), pool_type
    except ObjectNotFound:
        pool = shlex.quote(deployment.work_pool_name or "")
        raise ConfigurationError(
            f"There is no work pool {pool}. Make one: prefect work-pool create {pool} --type crew."
        ) from None
    except DeploymentApplyError as error:
        raise ConfigurationError(f"The deployment was not made: {error}") from error


async def backfill(
    deployment: Annotated[str, Parameter(name="DEPLOYMENT")],
    /,
    *,
    from_: Annotated[date | datetime, Parameter(name="--from")],
    to: date | datetime,
    schedule: str | None = None,
    dry_run: bool = False,
    output: Output = None,
) -> None:
    """Create the flow runs that a schedule lacks in a range of past dates.

    Args:
        deployment: Its name, flow/deployment.
        from_: The first day or time, such as 2026-01-01; UTC.
        to: The last one; a day means the whole of it.
        schedule: The schedule's slug, if there are several.
        dry_run: Show the times and create nothing.
    """
    runs = await create_runs(deployment, from_, to, schedule=schedule, dry_run=dry_run)
    found: list[dict[str, Any]] = [
        {
            "scheduled_for": run.scheduled_for.isoformat(),
            "created": run.created and not dry_run,
            "flow_run_id": run.flow_run and str(run.flow_run.id),
            "state": run.flow_run and run.flow_run.state_name,
        }
        for run in runs
    ]
    rows = [
        (
            f"{run.scheduled_for:%Y-%m-%d %H:%M} UTC",
            "created" if one["created"] else str(one["state"] or "to create"),
            page_url(one["flow_run_id"]) or one["flow_run_id"] or "",
        )
        for run, one in zip(runs, found, strict=True)
    ]
    empty = "The range has no time of that schedule."
    _output.put_rows(("Time", "Run", "Where"), rows, empty=empty, json=output and found)
