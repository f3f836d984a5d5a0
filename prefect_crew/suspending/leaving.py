"""Leaving a wait whose crew goes on, so that its flow run can be suspended: when, and what is written down before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.logs import run_logger
from prefect_crew.stopping import flow_run_id
from prefect_crew.suspending.standstill import Branch, branch_here
from prefect_crew.suspending.suspended import SuspendedWaits
from prefect_crew.suspending.suspension import StillRunningError, write_down
from prefect_crew.waiting import Phases, WaitPolicy

if TYPE_CHECKING:
    from prefect_crew.open_runs import OpenRun
    from prefect_crew.reviewing.forms import Form
    from prefect_crew.reviews import Question

__all__ = ["Leaving", "leaving_here"]

SLICE = 0.25
"""Seconds between two looks at whether all that the flow run waits for is waiting."""


class Leaving:
    """What one wait does to be left. `asks`: somebody is asked by this flow run when the crew waits for a person."""

    def __init__(self, branch: Branch, run: OpenRun, policy: WaitPolicy, own: str, *, asks: bool) -> None:
        self._branch = branch
        self._run = run
        self._policy = policy
        self._own = own
        self._asks = asks
        self._noted: tuple[bool, Question | None] = (False, None)
        self._able = False
        self._hurried = False

    async def asked_before(self, question: Question) -> bool:
        """Return whether this flow run was suspended with this question, of which everybody was told then."""
        record = self._run.record
        if record is None:
            return False
        try:
            waits = await SuspendedWaits().of(record.run_key, record.attempt, self._own)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("Whether run %s was asked about before could not be read: %s", record.kickoff_id, error)
            return False
        return any(wait.asks_for(question.asked, len(question.before)) for wait in waits)

    async def saw(self, status: CrewStatus, phases: Phases, form: Form | None = None) -> None:
        """Take in a status of a run that goes on, and the form by which a person can be asked meanwhile.

        Raises:
            StillRunningError: The wait is left. The status is one that was read after it was written down who waits:
                whatever happens from then on reaches whoever resumes the flow run.
        """
        record = self._run.record
        # Somebody is asked in this process, or the run may be lost: that is to be seen to the end here.
        asking = self._asks and status.state is CrewState.WAITING
        here = (asking and form is None) or status.state is CrewState.UNKNOWN
        self._able = record is not None and not here
        if record is None or here or not self._branch.may_leave():
            return
        question = form.question if form is not None and asking else None
        if self._noted == (True, question):
            self._branch.seconds = phases.most_left(self._policy, time.time())
            self._branch.form = form if asking else None
            raise StillRunningError(self._run.kickoff_id)
        noted = await write_down(
            record, self._own, self._policy, asks=self._asks, question=question, human_extra=phases.human_extra
        )
        self._noted, self._hurried = (noted, question), not noted

    def pausing(
        self, pause: Callable[[float], Awaitable[None]], woken: Callable[[], bool]
    ) -> Callable[..., Awaitable[None]]:
        """Return a pause that ends early, once, when the flow run could be suspended."""

        async def sleep(seconds: float) -> None:
            loop = asyncio.get_running_loop()
            until = loop.time() + seconds
            while (left := until - loop.time()) > 0:
                if not self._branch.may_leave():
                    self._hurried = False
                elif self._able and not self._hurried:
                    # Once to write down who waits; `saw` then asks for one more look.
                    self._hurried = True
                    return
                await pause(min(left, SLICE))
                if woken():
                    return

        return sleep

    async def forget(self) -> None:
        """Take away what was written down, now or by an earlier attempt of this flow run: the wait has ended."""
        if self._run.record is not None:
            await forget(self._run, self._own)


async def forget(run: OpenRun, own: str) -> None:
    """Take away that a flow run is suspended for a run. One that stays is taken away by whoever finds it."""
    if run.record is None:
        return
    try:
        await SuspendedWaits().forget(run.record, own)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("The note that this flow run was suspended for run %s stays: %s", run.kickoff_id, error)


def leaving_here(run: OpenRun, policy: WaitPolicy, *, asks: bool) -> Leaving | None:
    """Return what leaves the wait around this call, None where it is to be waited out."""
    branch, own = branch_here(), flow_run_id()
    if branch is None or own is None or policy.mode == "poll":
        return None
    return Leaving(branch, run, policy, own, asks=asks)
