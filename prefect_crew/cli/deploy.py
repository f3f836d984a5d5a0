"""`prefect-crew deploy`: a Prefect deployment of one crew, whose form asks for that crew's inputs."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli import terminal
from prefect_crew.cli.crews import CrewAccess, flag, is_url
from prefect_crew.cli.exits import UsageError
from prefect_crew.cli.given import gather_inputs
from prefect_crew.cli.prefect_side import deployment_url, reach_prefect
from prefect_crew.cli.progress import progress

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

    from prefect_crew.api.models import CrewInput
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.deploying import Plan

__all__ = ["deploy"]


def deploy(
    crew: Annotated[str, Parameter(name="CREW", help="The name of a stored block.")],
    /,
    *,
    name: Annotated[str | None, Parameter(help="The deployment's name, if not the crew's.")] = None,
    work_pool: Annotated[
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
    run_key: Annotated[
        str | None,
        Parameter(help="The run key of each run, such as 'daily-{{ scheduled_start:%Y-%m-%d }}'."),
    ] = None,
    concurrency_limit: Annotated[int | None, Parameter(help="How many of its runs may go on at once.")] = None,
    tag: Annotated[list[str] | None, Parameter(help="A tag; may be given again.", negative=())] = None,
) -> None:
    """Make a Prefect deployment of a crew whose form asks for that crew's inputs."""
    if is_url(crew):
        raise ConfigurationError(
            "A deployment needs a stored crew, whose token its runs can load: prefect-crew save NAME --url "
            f"{shlex.quote(crew)}, then prefect-crew deploy NAME."
        )
    if serve and work_pool:
        raise UsageError("Say either --serve or --work-pool: a served deployment has no pool.")
    if timezone and cron is None and interval is None:
        raise UsageError("--timezone is that of a schedule: give --cron or --interval too.")
    given = gather_inputs(input_ or (), inputs)
    with progress(quiet=True) as shown:
        reach_prefect(shown, quiet=not serve, lasting=True)
    from prefect_crew.deploying import Plan, deployment_of

    block, found, has_schedule = asyncio.run(_ask(crew, name or crew, given))
    plan = Plan(
        name=name or crew,
        inputs=given,
        run_key=run_key,
        work_pool=None if serve else work_pool or _default_pool(),
        cron=cron,
        interval=interval,
        timezone=timezone,
        concurrency_limit=concurrency_limit,
        tags=tag or (),
        has_schedule=has_schedule,
    )
    deployment = deployment_of(block, found, plan)
    deployment_id = asyncio.run(_apply(deployment))
    if serve:
        _serve(deployment)
        return
    _tell(deployment, deployment_id, plan, found, crew)


def _default_pool() -> str | None:
    from prefect.settings import get_current_settings

    return get_current_settings().deployments.default_work_pool_name


async def _ask(crew: str, name: str, given: Mapping[str, Any]) -> tuple[DeployedCrew, list[CrewInput], bool]:
    """Return the crew, its inputs, and whether its deployment of this name has a schedule already."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from prefect_crew.deploying import FLOW_NAME
    from prefect_crew.secret_blocks import values_of_blocks

    block = await CrewAccess().load(crew)
    await values_of_blocks(given, block.secret_inputs)  # before they are stored as the deployment's defaults
    async with block.client() as client:
        inputs = await client.inputs()
    async with get_client() as prefect:
        try:
            earlier = await prefect.read_deployment_by_name(f"{FLOW_NAME}/{name}")
        except ObjectNotFound:
            return block, inputs, False
    return block, inputs, bool(earlier.schedules)


async def _apply(deployment: RunnerDeployment) -> str:
    from prefect.client.orchestration import get_client
    from prefect.deployments.runner import DeploymentApplyError
    from prefect.exceptions import ObjectNotFound

    try:
        if deployment.work_pool_name:
            async with get_client() as client:
                await client.read_work_pool(deployment.work_pool_name)
    except ObjectNotFound:
        pool = deployment.work_pool_name
        raise ConfigurationError(
            f"There is no work pool {pool!r}. Make one: prefect work-pool create {pool} --type process."
        ) from None
    try:
        return str(await deployment.aapply())
    except DeploymentApplyError as error:
        raise ConfigurationError(f"The deployment was not made: {error}") from error


def _tell(deployment: RunnerDeployment, deployment_id: str, plan: Plan, found: list[CrewInput], crew: str) -> None:
    from prefect_crew.deploying import parameter_names

    names = parameter_names([item.name for item in found])
    terminal.put(
        f"Deployed {deployment.full_name}, which asks for {', '.join(item.name for item in found) or 'nothing'}."
    )
    page = deployment_url(deployment_id)
    if page:
        terminal.put(page)
    if plan.has_schedule and not plan.new_schedule:
        terminal.put("The schedule that it has stays.")
    needed = [names[item.name] for item in found if item.required and item.name not in plan.inputs]
    options = "".join(f" -p {shlex.quote(parameter)}=…" for parameter in needed)
    terminal.put(f"Run it: {terminal.command(f'prefect deployment run {shlex.quote(deployment.full_name)}')}{options}")
    if plan.work_pool:
        terminal.put(
            f"Its runs need a worker: {terminal.command(f'prefect worker start --pool {shlex.quote(plan.work_pool)}')}"
        )
    else:
        named = f" --name {shlex.quote(plan.name)}" if plan.name != crew else ""
        again = terminal.command(f"prefect-crew deploy {shlex.quote(crew)}{named} --serve")
        terminal.put(f"Nothing runs it yet: give --work-pool POOL, or serve it from a process of yours: {again}")


def _serve(deployment: RunnerDeployment) -> None:
    from prefect import serve

    terminal.put(f"Serving {deployment.full_name}: this process runs it until Ctrl-C.")
    terminal.put(f"Run it: {terminal.command(f'prefect deployment run {shlex.quote(deployment.full_name)}')}")
    sys.stdout.flush()  # whoever started this as a process reads the lines through a pipe
    serve(deployment, print_starting_message=False)  # pyright: ignore[reportUnknownMemberType]
