"""Bring suspended flow runs back whose crews have ended: the sweep for all that webhooks miss, or without any webhook.

A flow run that waits with WaitPolicy(mode="suspend") holds no process. This looks at the runs that such flow runs wait
for, and resumes those whose crew has ended, asks for a person, is lost or is over its time. Without webhooks it is what
resumes them at all, so its schedule is how late an end is noticed.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_crew.suspending.resuming import sweep


@flow(retries=2, retry_delay_seconds=10)
async def resume_suspended(at_once: int = 8) -> str:
    """Look once after everything that is suspended, and say what came of it.

    Args:
        at_once: How many crews are asked for their status at the same time.
    """
    found = await sweep(at_once=at_once)
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())) or "nothing is suspended"
    get_run_logger().info("%s", said)
    return said
