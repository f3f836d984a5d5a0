"""The process that runs the flow run of an attempt or a batch, and whether that process has ended."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import flow_run_id as own_flow_run_id
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.store.decision import Attempt

CLOCKS_APART = timedelta(minutes=5)
"""The most by which two clocks may differ: the clock of the process that suspended a flow run, and the clock of the
process that claimed the run."""


def this_process() -> str | None:
    """Return a name of this process that no other process of any machine has now; None if the system offers none.

    The name is a place, a blank, and the process id. The place has the host, the boot id, and the namespace of process
    ids, since containers of one host may share the first two. Process ids can be compared only within one place.
    """
    host = socket.gethostname().replace(" ", "_")
    if sys.platform == "darwin":
        return f"{host}/{uuid.getnode():x} {os.getpid()}"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host}/{boot}/{Path('/proc/self/ns/pid').readlink()} {os.getpid()}"
    except OSError:  # as on Windows, where `os.kill(pid, 0)` would end the process
        return None


def process_is_gone(name: str) -> bool:
    """Return whether a process has surely ended. False if this machine cannot know it, or the process id is in use."""
    own, (machine, _, pid) = this_process(), name.partition(" ")
    if own is None or machine != own.partition(" ")[0] or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process belongs to another user
        return False
    return False


def count_attempts(states: Sequence[State]) -> tuple[int, bool]:
    """Return the number of a flow run's attempts, and whether it was resumed before the last of them.

    A flow run that is resumed, for example after a form, continues its attempt. Up to Prefect 3.9.2, `run_count` counts
    the first resumption as an attempt, and does not count some later attempts.
    """
    attempts, resumed, was_resumed, before_last = 0, False, False, False
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.is_paused() or state.name == "Resuming":
            resumed = True
        elif state.is_running() and resumed:
            resumed, was_resumed = False, True
        elif state.is_running():
            attempts, before_last = attempts + 1, was_resumed
        elif not state.is_pending():
            resumed = False
    return attempts, before_last


async def crash_dead_owner(
    flow_run_id: str | None, flow_run_count: int | None, process: str | None, since: float, *, work: str = "crew's run"
) -> None:
    """Set the flow run of an attempt or a batch to Crashed if its process ran on this machine and has ended.

    `since`: when its work began, by the crew database. The function leaves a flow run alone that was started again or
    suspended since, or that is paused. If the Prefect API cannot be reached, it logs that and returns.
    """
    own = own_flow_run_id()
    if flow_run_id is None or flow_run_id == own or process is None or not process_is_gone(process):
        return
    try:
        async with get_client() as client:
            flow_run = await client.read_flow_run(UUID(flow_run_id))
            state = flow_run.state
            if state is None or not state.is_running():
                return
            states = await client.read_flow_run_states(flow_run.id)
            before = moment(since) - CLOCKS_APART
            if any(state.state_details.pause_reschedule and state.timestamp > before for state in states):
                return  # somebody has suspended the flow run since, and another process goes on with it
            if flow_run_count is not None and flow_run.run_count != flow_run_count:
                attempts, before_last = count_attempts(states)
                if before_last or attempts != flow_run_count:
                    return  # the flow run has begun again since, or the states do not say
            went_on = f"flow run {own}" if own else "a script"
            message = f"Its process ended. Its {work} continues with {went_on}."
            await client.set_flow_run_state(flow_run.id, Crashed(message=message))
    except ObjectNotFound:
        return
    except PREFECT_ERRORS as error:
        run_logger().debug("It is not known whether flow run %s is dead: %s", flow_run_id, error)
    else:
        run_logger().warning(
            "Flow run %s was set to Crashed: its process has ended. This process goes on with its %s.",
            *(flow_run_id, work),
        )


async def owner_has_ended(attempt: Attempt) -> bool:
    """Return whether the flow run that started a run has ended, or its process has. Without a flow run: False.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached.
    """
    if attempt.flow_run_id is None:
        return False
    if attempt.process is not None and process_is_gone(attempt.process):
        return True
    async with get_client() as client:
        try:
            flow_run = await client.read_flow_run(UUID(attempt.flow_run_id))
        except ObjectNotFound:
            return True
    return flow_run.state is not None and flow_run.state.is_final()
