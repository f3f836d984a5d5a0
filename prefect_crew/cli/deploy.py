"""Commands that create deployments, and automations: recovery of crashed flow runs, and alerts."""

from __future__ import annotations

import json
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from cyclopts import App, Group, Parameter, validators
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType

from prefect_crew.automations import (
    RECOVER,
    TAG,
    alert_automations,
    apply_automation,
    recovery_automations,
    slowest_heartbeat,
)
from prefect_crew.cli import _output
from prefect_crew.cli._options import (
    InputFile,
    Inputs,
    Key,
    Pool,
    gather_inputs,
    is_url,
)
from prefect_crew.cli._prefect import page_url
from prefect_crew.deployments import crew_flow, describe_schedule, pipeline_flow
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.operations import recover

WHAT = Group("Deploy one of", validator=validators.LimitedChoice(1, 1), sort_key=0)


async def deploy(
    crew: Annotated[str | None, Parameter(name="CREW", group=WHAT)] = None,
    /,
    *,
    pipeline: Annotated[Path | None, Parameter(group=WHAT)] = None,
    pool: Pool = None,
    cron: str | None = None,
    timezone: str | None = None,
    name: str | None = None,
    inputs: Inputs = None,
    input_file: InputFile = None,
    key: Key = None,
    session: str | None = None,
    tag: Annotated[list[str] | None, Parameter(name=["--tag", "-t"])] = None,
) -> None:
    """Deploy a crew or a pipeline. A deployment of the same name is replaced: give all its options again.

    Your own flows, and all options of Prefect: prefect deploy, or crew_flow and pipeline_flow in Python.

    Args:
        crew: The name of a stored crew.
        pipeline: A file with a pipeline, YAML or JSON.
        pool: The work pool whose workers run it, with this package installed; if left out, Prefect's default pool.
        cron: A cron schedule. Its runs have the inputs that are given here, and they alone the key.
        timezone: The schedule's time zone, such as Europe/Lisbon.
        name: The deployment's name; that of the crew or pipeline if left out.
        session: A session of a CrewAI Flow: each run starts from the state of the session's last completed run.
        tag: A tag; can be repeated.
    """
    if crew is not None and is_url(crew):
        raise ConfigurationError(
            "A deployment needs a stored crew, whose token its runs can load: prefect-crew crews save NAME --url "
            f"{shlex.quote(crew)}, then prefect-crew deploy NAME."
        )
    if timezone and cron is None:
        raise ConfigurationError("--timezone belongs to a schedule. Give --cron too.")
    flow = crew_flow(str(crew)) if pipeline is None else pipeline_flow(pipeline)
    schedules = None if cron is None else [CronSchedule(cron=cron, timezone=timezone)]
    parameters = {"inputs": gather_inputs(inputs, input_file), "idempotency_key": key, "session": session}
    deployment = await flow.ato_deployment(
        name,
        parameters={name: value for name, value in parameters.items() if value},
        schedules=schedules,
        tags=tag,
        work_pool_name=pool or get_current_settings().deployments.default_work_pool_name,
    )
    deployment_id = await _apply(deployment)
    async with get_client() as client:
        stored = await client.read_deployment(UUID(deployment_id))
    form = (stored.parameter_openapi_schema or {}).get("properties", {}).get("inputs", {})
    fields: dict[str, Any] = form.get("properties", {})
    _output.put(f"Deployed {deployment.full_name}, which asks for {', '.join(fields) or 'nothing'}.")
    if page := page_url(deployment_id, "deployment"):
        _output.put(page)
    for timetable in stored.schedules:
        _output.put(f"Its schedule: {await describe_schedule(timetable.schedule)}")
    needed = [field for field in form.get("required", ()) if "default" not in fields[field]]
    example = json.dumps(dict.fromkeys(needed, "…"), ensure_ascii=False)
    argument = f" -p {shlex.quote(f'inputs={example}')}" if needed else ""
    _output.put(f"Run it: prefect deployment run {shlex.quote(deployment.full_name)}{argument}")
    if stored.work_pool_name:  # left out, it keeps the pool that it has
        _output.put(f"Its runs need a worker: prefect worker start --pool {shlex.quote(stored.work_pool_name)}")
    else:
        _output.put("Nothing runs it yet. Deploy it again with --pool POOL.")


async def _apply(deployment: RunnerDeployment) -> str:
    """Store a deployment, and return its id."""
    try:
        return str(await deployment.aapply())
    except DeploymentApplyError as error:  # of a pool that is not there, too
        pool = shlex.quote(deployment.work_pool_name or "POOL")
        raise ConfigurationError(
            f"The deployment was not made: {error} A pool is made with: prefect work-pool create {pool} --type crew."
        ) from error


automations = App(name="automations")


@automations.command
async def apply(
    *,
    pool: Pool = None,
    notify: str | None = None,
    max_attempts: int = 3,
    waiting: Annotated[timedelta, Parameter(show_default="4h")] = timedelta(hours=4),
) -> None:
    """Set up the recovery of crashed flow runs, and with --notify alerts. Safe to run again.

    Recovery is for deployments with the tag recover-crashed. Run this again when you have tagged another one. Flow runs
    on a crew worker need no recovery. Alerts are about crews in any flow. An automation that was disabled on Prefect's
    page stays disabled.

    Args:
        pool: The work pool of deployment recover/crashed; left out, its present pool, at first Prefect's default pool.
        notify: The block that sends alerts, such as slack-webhook/crew-alerts. Left out, alerts are not changed.
        max_attempts: How many attempts a flow run gets, the first one included.
        waiting: How long a crew may wait for a person before there is an alert: 4h, 90m.
    """
    async with get_client() as client:
        alerts = alert_automations(await _notification_block(client, notify), waiting=waiting) if notify else []
        recover_id, heartbeat = await _recover_id(client, pool), await slowest_heartbeat(client)
        wanted = (*recovery_automations(recover_id, heartbeat=heartbeat, max_attempts=max_attempts), *alerts)
        changes = [await apply_automation(client, automation) for automation in wanted]
    rows = [
        (each.name, change if each.enabled else "disabled", each.description)
        for each, change in zip(wanted, changes, strict=True)
    ]
    _output.put_rows(("Automation", "State", "Description"), rows)
    if not alerts:
        _output.put("No alert was changed. Give --notify the TYPE/NAME of a block that prefect block ls shows.")


async def _notification_block(client: PrefectClient, notify: str) -> UUID:
    kind, _, name = notify.partition("/")
    try:
        block = await client.read_block_document_by_name(name, kind, include_secrets=False)
    except ObjectNotFound:
        raise ConfigurationError(
            f"There is no block {notify}. prefect block ls shows the types and names of yours. Nothing was changed."
        ) from None
    if block.block_schema is None or "notify" not in block.block_schema.capabilities:
        raise ConfigurationError(
            f"The block {notify} cannot send notifications. Give one that can, such as a slack-webhook. Nothing was "
            "changed."
        )
    return block.id


async def _recover_id(client: PrefectClient, pool: str | None) -> UUID:
    """Return the id of the deployment `RECOVER`. If `pool` is given or there is none yet, deploy `recover` first."""
    if pool is None:
        try:
            return (await client.read_deployment_by_name(RECOVER)).id
        except ObjectNotFound:
            pool = get_current_settings().deployments.default_work_pool_name
    if pool is None:
        raise ConfigurationError(
            f"Recovery needs a work pool for its deployment {RECOVER}. Nothing was changed. Give --pool POOL."
        )
    deployment: Any = recover.to_deployment(
        RECOVER.partition("/")[2], work_pool_name=pool, tags=[TAG], entrypoint_type=EntrypointType.MODULE_PATH
    )
    return UUID(await _apply(await deployment))
