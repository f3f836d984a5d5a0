"""The commands `automations`: recovery of crashed flow runs, and alerts about crews."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from cyclopts import App, Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._options import Output, Yes
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.cli.deploy import apply_deployment
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.events.schemas.automations import Automation

app = App(name="automations", help="Automations that begin crashed flow runs again, and alert people.")


@app.command
def apply(
    *,
    pool: Annotated[str | None, Parameter(name=["--pool", "-p"])] = None,
    notify: str | None = None,
    max_attempts: int = 3,
    waiting: Annotated[timedelta, Parameter(show_default="4h")] = timedelta(hours=4),
    output: Output = None,
) -> None:
    """Set up the recovery of crashed flow runs, and with --notify alerts. Safe to run again.

    Recovery is for deployments with the tag recover-crashed: run this again when you have tagged another. Flow runs on
    a crew worker need none. Alerts are about crews in any flow. What was disabled on Prefect's page stays disabled.

    Args:
        pool: The work pool that recovers, for the deployment recover/crashed; if left out, where that is.
        notify: The block that alerts go through, as TYPE/NAME: slack-webhook/crew-alerts. Left out, alerts stay as
            they are.
        max_attempts: How often a flow run is begun in all.
        waiting: How long a crew may wait for a person before there is an alert: 4h, 90m.
    """
    reach_prefect(lasting=True)
    from prefect.client.orchestration import get_client

    from prefect_crew.deployments import (
        alert_automations,
        apply_automation,
        read_automations,
        recovery_automations,
        slowest_heartbeat,
    )

    async def set_up() -> tuple[dict[str, str], list[Automation]]:
        async with get_client() as client:
            block_id = await _block_id(client, notify) if notify else None
            recover_id = await _recover_id(client, pool)
            heartbeat = await slowest_heartbeat(client)
            wanted = recovery_automations(recover_id, heartbeat=heartbeat, max_attempts=max_attempts)
            if block_id is not None:
                wanted += alert_automations(block_id, waiting=waiting)
            done = {one.name: await apply_automation(client, one) for one in wanted}
            return done, await read_automations(client)

    done, found = asyncio.run(set_up())
    _put(found, output, changes=done)
    if not output and not any("alert" in one.name for one in found):
        _output.put("There are no alerts: give --notify TYPE/NAME, of a block that prefect block ls shows.")


@app.command
def ls(*, output: Output = None) -> None:
    """List the automations of this package, and what each does."""
    reach_prefect(lasting=True)
    _put(asyncio.run(_read()), output)


@app.command
def rm(*names: Annotated[str, Parameter(name="NAME")], yes: Yes = False, output: Output = None) -> None:
    """Remove automations of this package: those that are named, or all.

    Args:
        names: The name of one, such as recover; can be repeated.
    """
    reach_prefect(lasting=True)
    from prefect.client.orchestration import get_client

    from prefect_crew.deployments import RECOVER, TAG

    asked = [f"{TAG}: {name.removeprefix(f'{TAG}: ')}" for name in names]
    found = [one for one in asyncio.run(_read()) if not asked or one.name in asked]
    if missing := set(asked) - {one.name for one in found}:
        raise ConfigurationError(
            f"There is no automation {', '.join(sorted(missing))}. To list them: prefect-crew automations ls."
        )
    if found:
        names_of_all = ", ".join(one.name for one in found)
        _output.confirm(f"Remove the automations {names_of_all}?", yes=yes)

    async def remove() -> None:
        async with get_client() as client:
            for one in found:
                await client.delete_automation(one.id)

    asyncio.run(remove())
    _put(found, output, changes=dict.fromkeys([one.name for one in found], "removed"))
    if not output and any(one.name == f"{TAG}: recover" for one in found):
        _output.put(f"The deployment stays. To delete it: prefect deployment delete {RECOVER}")


async def _read() -> list[Automation]:
    from prefect.client.orchestration import get_client

    from prefect_crew.deployments import read_automations

    async with get_client() as client:
        return await read_automations(client)


async def _block_id(client: PrefectClient, notify: str) -> UUID:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = notify.partition("/")
    try:
        return (await client.read_block_document_by_name(name, kind, include_secrets=False)).id
    except ObjectNotFound:
        raise ConfigurationError(
            f"There is no block {notify}. prefect block ls shows the types and names of yours. Nothing was changed."
        ) from None


async def _recover_id(client: PrefectClient, pool: str | None) -> UUID:
    """Return the id of the deployment that recovers, made on the work pool that is given."""
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import get_current_settings

    from prefect_crew.deployments import RECOVER, Plan, build_deployment, flow_target

    if pool is None:
        try:
            return (await client.read_deployment_by_name(RECOVER)).id
        except ObjectNotFound:
            pool = get_current_settings().deployments.default_work_pool_name
    if pool is None:
        raise ConfigurationError(
            f"Recovery needs a work pool, for its deployment {RECOVER}: give --pool POOL. Nothing was changed."
        )
    target, plan = flow_target("prefect_crew.operations.recover", {}), Plan(RECOVER.partition("/")[2], work_pool=pool)
    deployment_id, _ = await apply_deployment(build_deployment(target, plan))
    return UUID(deployment_id)


def _put(found: Sequence[Automation], output: str | None, *, changes: dict[str, str] | None = None) -> None:
    """Write automations: what each does, and what has become of it or whether it is enabled."""
    lines: list[dict[str, Any]] = [
        {"name": one.name, "enabled": one.enabled, "description": one.description}
        | ({} if changes is None else {"change": changes.get(one.name, "kept")})
        for one in found
    ]
    if output:
        _output.put_json(lines)
        return
    rows: list[tuple[str, str, str]] = []
    for one in lines:
        state = one.get("change", "enabled")
        rows.append((one["name"], state if one["enabled"] or state == "removed" else "disabled", one["description"]))
    empty = "There are no automations of this package: prefect-crew automations apply."
    _output.put_rows(("Automation", "State", "What it does"), rows, empty=empty)
