"""Commands that create deployments and their flow runs."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import JSON, CrewAccess, flag, gather_inputs, is_url
from prefect_crew.cli._prefect import deployment_url, flow_run_url, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

    from prefect_crew.deployments import Plan


def backfill(
    deployment: Annotated[str, Parameter(name="DEPLOYMENT", help="Its name, flow/deployment.")],
    /,
    *,
    from_: Annotated[str, Parameter(name="--from", help="The first day or time, such as 2026-01-01; UTC.")],
    to: Annotated[str, Parameter(name="--to", help="The last one; a day means the whole of it.")],
    every: Annotated[str | None, Parameter(help="The pause between two times: 1d, 12h. Else the schedule's.")] = None,
    schedule: Annotated[str | None, Parameter(help="The schedule's slug, where there are several.")] = None,
    dry_run: Annotated[bool, flag("Show the times and create nothing.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Create the flow runs of a deployment that a range of dates lacks; a second call creates nothing twice."""
    first, last = _moment("--from", from_), _moment("--to", to)
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    from prefect_crew import deployments as logic
    from prefect_crew.records.store import parse_age

    try:
        pause = None if every is None else parse_age(every)
    except ConfigurationError as error:
        raise UsageError(f"--every {error}") from None
    runs = asyncio.run(logic.backfill(deployment, first, last, pause, schedule=schedule, dry_run=dry_run))
    if json:
        _output.put_json(
            [
                {
                    "scheduled_for": run.scheduled_for.isoformat(),
                    "created": run.created and not dry_run,
                    "flow_run_id": None if run.flow_run_id is None else str(run.flow_run_id),
                    "state": run.state,
                }
                for run in runs
            ]
        )
        return
    word = "to create" if dry_run else "created"
    rows = [
        (
            f"{run.scheduled_for:%Y-%m-%d %H:%M} UTC",
            word if run.created else run.state,
            (flow_run_url(str(run.flow_run_id)) or str(run.flow_run_id)) if run.flow_run_id else "",
        )
        for run in runs
    ]
    _output.put_rows(("Time", "Run", "Where"), rows, empty="The range has no time of that schedule.")


def _moment(option: str, text: str) -> date:
    """Read a day or a time."""
    try:
        return date.fromisoformat(text) if len(text) <= len("2026-01-01") else datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} {text}: give a day such as 2026-01-01, or a time such as 2026-01-01T06:00."
        ) from None


def deploy(
    crew: Annotated[str | None, Parameter(name="CREW", help="The name of a stored block.")] = None,
    /,
    *,
    pipeline: Annotated[str | None, Parameter(help="In place of a crew: a file with a pipeline, YAML or JSON.")] = None,
    flow: Annotated[
        str | None,
        Parameter(help="In place of a crew: the import path of an asynchronous flow, my_package.flows.my_flow."),
    ] = None,
    name: Annotated[str | None, Parameter(help="The deployment's name, if not that of the crew or pipeline.")] = None,
    pool: Annotated[
        str | None, Parameter(help="The work pool whose workers run it; this package has to be installed there.")
    ] = None,
    serve: Annotated[bool, flag("Run it in this process, until Ctrl-C, instead of on a work pool.")] = False,
    input_: Annotated[
        list[str] | None,
        Parameter(
            name=["--input", "-i"], help="A default for an input, as name=value; may be given again.", negative=()
        ),
    ] = None,
    inputs: Annotated[str | None, Parameter(name="--inputs", help="A file of such defaults, JSON or YAML.")] = None,
    cron: Annotated[str | None, Parameter(help="A cron schedule. Each required input then needs a default.")] = None,
    interval: Annotated[float | None, Parameter(help="A schedule, each so many seconds.")] = None,
    timezone: Annotated[str | None, Parameter(help="The schedule's time zone, such as Europe/Lisbon.")] = None,
    idempotency_key: Annotated[
        str | None,
        Parameter(help="The idempotency key of each run, such as 'daily-{{ scheduled_start:%Y-%m-%d }}'."),
    ] = None,
    concurrency_limit: Annotated[int | None, Parameter(help="How many of its runs may go on at once.")] = None,
    tag: Annotated[list[str] | None, Parameter(help="A tag; may be given again.", negative=())] = None,
) -> None:
    """Make a Prefect deployment of a crew or a pipeline whose form asks for its inputs, or of a flow."""
    _check(crew, pipeline, flow, idempotency_key)
    if serve and pool:
        raise UsageError("Say either --serve or --pool: a served deployment has no pool.")
    if timezone and cron is None and interval is None:
        raise UsageError("--timezone is that of a schedule: give --cron or --interval too.")
    given = gather_inputs(input_ or (), inputs)
    text = None if pipeline is None else _read(pipeline)
    with progress(quiet=True) as shown:
        reach_prefect(shown, quiet=not serve, lasting=True)
    from prefect_crew.deployments import Plan

    plan = Plan(
        name=name or "",
        inputs=given,
        idempotency_key=idempotency_key,
        work_pool=None if serve else pool or _default_pool(),
        cron=cron,
        interval=interval,
        timezone=timezone,
        concurrency_limit=concurrency_limit,
        tags=tag or (),
    )
    if crew is not None:
        made = asyncio.run(_of_crew(crew, plan))
    elif pipeline is not None:
        made = asyncio.run(_of_pipeline(text or "", pipeline, plan))
    else:
        made = asyncio.run(_of_flow(flow or "", plan))
    deployment_id, kind = asyncio.run(_apply(made.deployment))
    if serve:
        _serve(made.deployment)
        return
    _tell(made, deployment_id)
    if flow is not None and kind == "crew" and not flow.startswith("prefect_crew."):
        module = shlex.quote(flow.rpartition(".")[0])
        _output.put(f"Its workers have to allow the module: PREFECT_INTEGRATIONS_CREW_WORKER_MODULES={module}")


def _check(crew: str | None, pipeline: str | None, flow: str | None, idempotency_key: str | None) -> None:
    if len([one for one in (crew, pipeline, flow) if one is not None]) != 1:
        raise UsageError("Say what to deploy: CREW, --pipeline FILE or --flow PATH, one of them.")
    if crew is not None and is_url(crew):
        raise ConfigurationError(
            "A deployment needs a stored crew, whose token its runs can load: prefect-crew save NAME --url "
            f"{shlex.quote(crew)}, then prefect-crew deploy NAME."
        )
    if flow is not None and idempotency_key is not None:
        raise UsageError("--key is for crews and pipelines. Give a flow its own parameter with -i.")


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"The pipeline in {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"The pipeline in {file} cannot be read: it is not text in UTF-8.") from None


def _default_pool() -> str | None:
    from prefect.settings import get_current_settings

    return get_current_settings().deployments.default_work_pool_name


@dataclass(frozen=True)
class _Made:
    """A deployment that is ready to be applied, and what is said of it."""

    deployment: RunnerDeployment
    plan: Plan
    command: str
    """What deploys the same again, as far as the name of what is deployed goes."""
    asks: Sequence[str]
    """The names of the inputs that it asks for."""
    example: Sequence[str]
    """Options of `prefect deployment run` for those that have to be given."""


async def _of_crew(crew: str, plan: Plan) -> _Made:
    from prefect_crew.deployments import FLOW_NAME, deployment_of, parameter_names
    from prefect_crew.runs.secret_blocks import values_of_blocks

    found = await CrewAccess().load(crew)
    await values_of_blocks(plan.inputs, found.secret_inputs)  # before they are stored as the deployment's defaults
    async with found.client() as client:
        inputs = await client.inputs()
    plan = await _named(plan, FLOW_NAME, crew)
    names = parameter_names([item.name for item in inputs])
    needed = [names[item.name] for item in inputs if item.required and item.name not in plan.inputs]
    return _Made(
        deployment_of(found, inputs, plan),
        plan,
        f"{shlex.quote(crew)}{_renamed(plan, crew)}",
        [item.name for item in inputs],
        [f"{parameter}=…" for parameter in needed],
    )


async def _of_pipeline(text: str, file: str, plan: Plan) -> _Made:
    from prefect_crew.deployments import pipeline_deployment, resolved_pipeline
    from prefect_crew.pipelines.definition import read_pipeline
    from prefect_crew.pipelines.run import run_deployed_pipeline

    pipeline = await resolved_pipeline(read_pipeline(text, file), plan.inputs)
    plan = await _named(plan, run_deployed_pipeline.name, pipeline.name)
    needed = {name: "…" for name, item in pipeline.inputs.items() if item.needed}
    return _Made(
        pipeline_deployment(pipeline, plan),
        plan,
        f"--pipeline {shlex.quote(file)}{_renamed(plan, pipeline.name)}",
        list(pipeline.inputs),
        [shlex.quote(f"inputs={json.dumps(needed, ensure_ascii=False)}")] if needed else [],
    )


async def _of_flow(entrypoint: str, plan: Plan) -> _Made:
    from prefect_crew.deployments import flow_deployment, needed_parameters
    from prefect_crew.worker import load_flow

    flow = load_flow(entrypoint)
    own = entrypoint.rpartition(".")[2]
    plan = await _named(plan, flow.name, own)
    parameters, needed = needed_parameters(flow)
    return _Made(
        flow_deployment(entrypoint, plan),
        plan,
        f"--flow {shlex.quote(entrypoint)}{_renamed(plan, own)}",
        parameters,
        [f"{parameter}=…" for parameter in needed if parameter not in plan.inputs],
    )


def _renamed(plan: Plan, own: str) -> str:
    return f" --name {shlex.quote(plan.name)}" if plan.name != own else ""


async def _named(plan: Plan, flow_name: str, own: str) -> Plan:
    """Return the plan with a name, and whether the deployment of that name has a schedule already."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    plan = replace(plan, name=plan.name or own)
    async with get_client() as prefect:
        try:
            earlier = await prefect.read_deployment_by_name(f"{flow_name}/{plan.name}")
        except ObjectNotFound:
            return plan
    return replace(plan, has_schedule=bool(earlier.schedules))


async def _apply(deployment: RunnerDeployment) -> tuple[str, str | None]:
    """Store a deployment; return its id and the type of its work pool."""
    from prefect.client.orchestration import get_client
    from prefect.deployments.runner import DeploymentApplyError
    from prefect.exceptions import ObjectNotFound

    kind: str | None = None
    try:
        if deployment.work_pool_name:
            async with get_client() as client:
                kind = (await client.read_work_pool(deployment.work_pool_name)).type
    except ObjectNotFound:
        pool = shlex.quote(deployment.work_pool_name or "")
        raise ConfigurationError(
            f"There is no work pool {pool}. Make one: prefect work-pool create {pool} --type crew."
        ) from None
    try:
        return str(await deployment.aapply()), kind
    except DeploymentApplyError as error:
        raise ConfigurationError(f"The deployment was not made: {error}") from error


def _tell(made: _Made, deployment_id: str) -> None:
    deployment, plan = made.deployment, made.plan
    _output.put(f"Deployed {deployment.full_name}, which asks for {', '.join(made.asks) or 'nothing'}.")
    page = deployment_url(deployment_id)
    if page:
        _output.put(page)
    if plan.has_schedule and not plan.new_schedule:
        _output.put("The schedule that it has stays.")
    options = "".join(f" -p {option}" for option in made.example)
    _output.put(f"Run it: {_output.command(f'prefect deployment run {shlex.quote(deployment.full_name)}')}{options}")
    if plan.work_pool:
        _output.put(
            f"Its runs need a worker: {_output.command(f'prefect worker start --pool {shlex.quote(plan.work_pool)}')}"
        )
    else:
        again = _output.command(f"prefect-crew deploy {made.command} --serve")
        _output.put(f"Nothing runs it yet: give --pool POOL, or serve it from a process of yours: {again}")


def _serve(deployment: RunnerDeployment) -> None:
    from prefect import serve

    _output.put(f"Serving {deployment.full_name}: this process runs it until Ctrl-C.")
    _output.put(f"Run it: {_output.command(f'prefect deployment run {shlex.quote(deployment.full_name)}')}")
    sys.stdout.flush()  # whoever started this as a process reads the lines through a pipe
    serve(deployment, print_starting_message=False)  # pyright: ignore[reportUnknownMemberType]
