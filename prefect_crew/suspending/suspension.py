"""Suspending a flow run while its crews work: where that can be done, and doing it.

After a kickoff that is on record nothing is lost when the process ends: the flow runs again from the top, and each call
finds its run by the record. So the flow run is set to Suspended and its process ends; `resuming` brings it back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import httpx
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import Pause, PrefectException
from prefect.flow_runs import asuspend_flow_run
from pydantic import BaseModel, SecretStr

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.logs import run_logger
from prefect_crew.records import RunRecord, utcnow
from prefect_crew.suspending.standstill import Branch, Standstill, standstill_of
from prefect_crew.suspending.suspended import SuspendedWait, SuspendedWaits
from prefect_crew.waiting import WaitPolicy

if TYPE_CHECKING:
    from prefect_crew.reviewing.forms import Form
    from prefect_crew.reviews import Question

__all__ = [
    "PAUSE_KEY",
    "StillRunningError",
    "checked_wait",
    "polling_only",
    "standstill_here",
    "suspend_timeout",
    "suspend_together",
    "why_not",
    "write_down",
]

PAUSE_KEY = "prefect-crew:"
"""What the keys of our suspensions begin with: nobody resumes what somebody else has paused."""
MARGIN = 3600.0
"""Seconds for which Prefect lets a flow run stay suspended after all its budgets: whoever resumes it is to be first, so
that the flow itself says that its time is over."""
AT_MOST = 10 * 365 * 86400.0
"""Seconds that stand for no limit, so that none of Prefect's own defaults comes in."""
STARRED = "********"


class StillRunningError(Exception):
    """Ends a wait whose crew goes on, so that the flow run can be suspended. Never seen outside of this package."""


# Where it can be done


def why_not() -> str | None:
    """Return why the code around this call cannot be suspended, None where it can."""
    if TaskRunContext.get() is not None:
        return "it is called from within a task, and only a flow's own code can be suspended. Call it in the flow"
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    if context is None or flow_run is None:
        return "it is called outside of a flow run, and so from a script that nobody could begin again"
    if flow_run.parent_task_run_id is not None:
        return (
            "this flow run is a subflow, and Prefect suspends none. Call it in the outermost flow, or deploy this one"
        )
    if flow_run.deployment_id is None:
        return "this flow run has no deployment, so that no worker could begin it again. Deploy the flow or serve it"
    if starred := _starred(context.parameters):
        return (
            f"the parameter {starred} holds a secret that Prefect does not store with a flow run. Give a block's name "
            "instead of the block"
        )
    return None


def _starred(parameters: Mapping[str, Any] | None) -> str | None:
    return next((name for name, value in (parameters or {}).items() if _masked(value)), None)


def _masked(value: Any) -> bool:
    """Whether a value is, or holds, a secret that came back from Prefect's database as stars."""
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if isinstance(value, str):
        return value.startswith(STARRED) and not value.strip("*")
    if isinstance(value, BaseModel):
        return any(_masked(getattr(value, name)) for name in type(value).model_fields)
    if isinstance(value, Mapping):
        return any(_masked(one) for one in cast("Mapping[Any, Any]", value).values())
    if isinstance(value, list | tuple | set):
        return any(_masked(one) for one in cast("list[Any]", value))
    return False


def checked_wait(policy: WaitPolicy, what: str) -> WaitPolicy:
    """Return how to wait right here, before anything is paid for: as the policy says, or by polling where it allows.

    Raises:
        ConfigurationError: The flow run is to be suspended and cannot be.
    """
    return policy if policy.mode == "poll" or (reason := why_not()) is None else _instead(policy, what, reason)


def polling_only(policy: WaitPolicy, what: str) -> WaitPolicy:
    """Return how to wait where nothing can ever be suspended.

    Raises:
        ConfigurationError: The policy says to suspend, and not to poll instead.
    """
    if policy.mode == "poll":
        return policy
    return _instead(policy, what, "it holds a process by its nature. Wait with mode='poll'")


def _instead(policy: WaitPolicy, what: str, reason: str) -> WaitPolicy:
    if policy.suspend_fallback == "poll":
        run_logger().info("%s polls instead of suspending the flow run: %s.", what, reason.partition(". ")[0])
        return policy.polling
    raise ConfigurationError(
        f"{what} is to wait with mode='suspend', which it cannot: {reason}, or set suspend_fallback='poll' to have the "
        "process wait instead. Nothing was started."
    )


def standstill_here() -> Standstill:
    """Return what the flow run around this call counts its work in; one of its own outside of any."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return Standstill()
    return standstill_of(str(context.flow_run.id), context.flow_run.run_count)


# Doing it


async def write_down(
    record: RunRecord,
    flow_run_id: str,
    policy: WaitPolicy,
    *,
    asks: bool,
    question: Question | None = None,
    human_extra: float = 0.0,
) -> bool:
    """Note that a flow run is about to be suspended for a run; False if that cannot be written down now."""
    wait = SuspendedWait(
        flow_run_id=flow_run_id,
        run_key=record.run_key,
        attempt=record.attempt,
        since=utcnow(),
        policy=policy,
        asks=asks,
        asked=None if question is None else question.asked or "",
        answers=0 if question is None else len(question.before),
        human_extra=human_extra,
    )
    try:
        await SuspendedWaits().put(wait)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning(
            "The flow run is not suspended: who waits for run %s is not on record: %s", record.kickoff_id, error
        )
        return False
    return True


def suspend_timeout(left: list[float | None]) -> int:
    """Return for how many seconds a flow run may be suspended, from how long each of its runs may go on."""
    longest = max((AT_MOST if one is None else one for one in left), default=AT_MOST)
    return math.ceil(min(longest + MARGIN, AT_MOST))


async def suspend_together(branch: Branch) -> None:
    """Suspend the flow run once every branch of it has left its wait; return if it has to be waited on instead.

    Raises:
        Pause: The flow run is suspended. Prefect ends its process.
    """
    standstill = branch.standstill
    standstill.left(branch)
    while (verdict := standstill.verdict(branch)) is None and standstill.signal is None:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # not an event: other branches may be on other threads' loops
    if standstill.signal is not None:
        raise standstill.signal
    if not verdict:
        standstill.back(branch)
        return
    try:
        forms = standstill.forms()
        if any([await form.answered() for form in forms]):
            standstill.worked()
        else:
            await _suspend(suspend_timeout(standstill.seconds()), forms[0] if forms else None)
    except Pause as signal:
        standstill.signal = Pause(state=signal.state)
        raise
    except (RuntimeError, httpx.HTTPError, PrefectException) as error:
        # It is being cancelled, or the Prefect API is away: its process waits on.
        run_logger().warning("The flow run could not be suspended now, and waits in its process: %s", error)
        standstill.worked()
    standstill.back(branch)


async def _suspend(seconds: int, form: Form | None) -> None:
    key = f"{PAUSE_KEY}{uuid4()}"
    if form is None:
        await asuspend_flow_run(timeout=seconds, key=key)
        return
    run_logger().info("The flow run is suspended with a form about run %s.", form.question.kickoff_id)
    state = await form.suspend(seconds, key)
    # As asuspend_flow_run does: whatever else the flow begins meanwhile ends with it.
    if (context := FlowRunContext.get()) is not None:
        context.flow_run_suspension_request.mark_requested(state)
    raise Pause(state=state)
