"""A batch looked at before it is run."""

from __future__ import annotations

import asyncio

from prefect_crew.api.models import CrewState
from prefect_crew.batches.ends import MISFIT
from prefect_crew.batches.expecting import expected_inputs
from prefect_crew.batches.job import BatchJob
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import IN_FLIGHT
from prefect_crew.batches.report import BatchPlan
from prefect_crew.crew import CrewSession

__all__ = ["plan_of"]


async def plan_of(job: BatchJob, seconds_per_run: float | None) -> BatchPlan:
    """Check every row of a batch, and say how many, how long and how much. Nothing is started.

    Args:
        job: The batch.
        seconds_per_run: The duration of one run; None takes the mean of those that the ledger has seen.
    """
    async with CrewSession(job.crew) as session:
        plan = job.plan(await expected_inputs(session))
    checked = await asyncio.to_thread(plan.check)
    done, mean = 0, None
    if not job.place.local or job.place.exists:
        async with Ledger(job.place.ledger, job.name) as ledger:
            counts = await ledger.counts()
            done = sum(counts.get(str(state), 0) for state in CrewState if state.ended) + counts.get(MISFIT, 0)
            mean = (await ledger.run_times()).mean
    duration = mean if seconds_per_run is None else seconds_per_run
    left = max(checked.total - done, 0)
    most = job.options.max_in_flight or IN_FLIGHT
    seconds = None if duration is None else -(-left // most) * duration
    if job.options.kickoffs_per_second is not None:
        seconds = max(seconds or 0.0, left / job.options.kickoffs_per_second)
    return BatchPlan(
        name=job.name,
        rows=checked.total,
        done=done,
        bad=checked.bad,
        bad_count=checked.bad_count,
        duplicates=checked.duplicates,
        max_in_flight=most,
        seconds=seconds,
        price=None if job.crew.price is None else job.crew.price * left,
        notes=plan.notes(),
    )
