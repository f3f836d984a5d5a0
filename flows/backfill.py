"""The flow runs that a deployment lacks for past times, such as the days before it had a schedule.

A flow run has the past time as its scheduled time, and the parameters of the deployment's first schedule. So an
idempotency key such as "daily-{scheduled_start:%Y-%m-%d}" means that day, and a day whose crew has run gives the result
that it had. A second call creates no flow run twice.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from prefect import flow, get_client
from prefect.deployments import arun_deployment


@flow(flow_run_name="{deployment}")
async def backfill(deployment: str, first: datetime, last: datetime, every_hours: float = 24, at_once: int = 3) -> int:
    """Create a flow run for each time, wait for all, and return how many there are. Fails if one did not complete.

    Args:
        deployment: Its name, flow/deployment.
        first: The first time, in UTC if it has no time zone.
        last: No flow run is later than this.
        every_hours: Hours between two times.
        at_once: How many flow runs may go on at once.
    """
    first, last = (time if time.tzinfo else time.replace(tzinfo=UTC) for time in (first, last))
    step, slots = timedelta(hours=every_hours), asyncio.Semaphore(at_once)
    times = [first + number * step for number in range((last - first) // step + 1)]
    async with get_client() as client:
        schedules = (await client.read_deployment_by_name(deployment)).schedules
    options = {"parameters": schedules[0].parameters if schedules else None, "tags": ["backfill"]}

    async def run(time: datetime) -> bool:
        key = f"backfill {deployment} {time.isoformat()}"  # of Prefect: for a key that it knows, it creates no flow run
        async with slots:
            flow_run = await arun_deployment(deployment, scheduled_time=time, idempotency_key=key, **options)
        return flow_run.state is not None and flow_run.state.is_completed()

    completed = await asyncio.gather(*map(run, times))
    if failed := [f"{time:%Y-%m-%d %H:%M}" for time, done in zip(times, completed, strict=True) if not done]:
        raise RuntimeError(f"These flow runs did not complete: {', '.join(failed)}. Retry them on Prefect's page.")
    return len(times)
