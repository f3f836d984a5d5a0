"""The commands `automations`: recovery of crashed flow runs, and alerts about crews."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated
from uuid import UUID

from cyclopts import App, Parameter
from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from prefect_crew.cli import _output
from prefect_crew.cli._options import Output, Pool, Yes
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.cli.deploy import apply_deployment
from prefect_crew.deployments import (
    RECOVER,
    alert_automations,
    apply_automation,
    build_deployment,
    flow_target,
    read_automations,
    recovery_automations,
    slowest_heartbeat,
)
from prefect_crew.exceptions import ConfigurationError

app = App(name="automations")


@app.command
async def apply(
    *,
    pool: Pool = None,
    notify: str | None = None,
    max_attempts: int = 3,
    waiting: Annotated[timedelta, Parameter(show_default="4h")] = timedelta(hours=4),
    output: Output = None,
) -> None:
    """Set up the recovery of crashed flow runs, and with --notify alerts. Safe to run again.

    Recovery is for deployments with the tag recover-crashed: run this again when you have tagged another. Flow runs on
    a crew worker need none. Alerts are about crews in any flow. What was disabled on Prefect's page stays disabled.

    Args:
        pool: The work pool of the deployment recover/crashed, which recovers; if left out, the one that it has.
        notify: The block that sends alerts, such as slack-webhook/crew-alerts. Left out, alerts are not changed.
        max_attempts: How many attempts a flow run gets, the first one included.
        waiting: How long a crew may wait for a person before there is an alert: 4h, 90m.
    """
    async with get_client() as client:
        alerts = alert_automations(await _block_id(client, notify), waiting=waiting) if notify else []
        recover_id, heartbeat = await _recover_id(client, pool), await slowest_heartbeat(client)
        wanted = recovery_automations(recover_id, heartbeat=heartbeat, max_attempts=max_attempts)
        done = {one.name: await apply_automation(client, one) for one in (*wanted, *alerts)}
        found = await read_automations(client)
    _put(found, output, done)
    if not output and not any("alert" in one.name for one in found):
        _output.put("There are no alerts: give --notify TYPE/NAME, of a block that prefect block ls shows.")


@app.command
async def ls(*, output: Output = None) -> None:
    """List the automations of this package, and what each does."""
    _put(await _read(), output)


@app.command
def rm(*, yes: Yes = False, output: Output = None) -> None:
    """Remove the automations of this package. To remove one of them: prefect automation delete NAME."""
    reach_prefect(lasting=True)
    found = asyncio.run(_read())
    if found:
        _output.confirm(f"Remove the automations {', '.join(one.name for one in found)}?", yes=yes)

    async def remove() -> None:
        async with get_client() as client:
            for one in found:
                await client.delete_automation(one.id)

    asyncio.run(remove())
    _put(found, output, dict.fromkeys([one.name for one in found], "removed"))
    if not output and found:
        _output.put(f"The deployment stays. To delete it: prefect deployment delete {RECOVER}")


async def _read() -> list[Automation]:
    async with get_client() as client:
        return await read_automations(client)


async def _block_id(client: PrefectClient, notify: str) -> UUID:
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
    """Return the id of the deployment that recovers, made on the work pool that is given."""
    if pool is None:
        try:
            return (await client.read_deployment_by_name(RECOVER)).id
        except ObjectNotFound:
            pool = get_current_settings().deployments.default_work_pool_name
    if pool is None:
        raise ConfigurationError(
            f"Recovery needs a work pool, for its deployment {RECOVER}: give --pool POOL. Nothing was changed."
        )
    target = flow_target("prefect_crew.operations.recover", {})
    deployment_id, _ = await apply_deployment(build_deployment(target, RECOVER.partition("/")[2], work_pool_name=pool))
    return UUID(deployment_id)


def _put(found: Sequence[Automation], output: str | None, changes: dict[str, str] | None = None) -> None:
    """Write automations: what each does, and what has become of it or whether it is enabled."""
    lines = [{"name": one.name, "enabled": one.enabled, "description": one.description} for one in found]
    for line in lines if changes is not None else []:
        line["change"] = (changes or {}).get(str(line["name"]), "kept")
    rows: list[tuple[str, ...]] = []
    for line in lines:
        state = str(line.get("change", "enabled"))
        is_off = not line["enabled"] and state != "removed"
        rows.append((str(line["name"]), "disabled" if is_off else state, str(line["description"])))
    empty = "There are no automations of this package: prefect-crew automations apply."
    _output.put_rows(("Automation", "State", "What it does"), rows, empty=empty, json=output and lines)
