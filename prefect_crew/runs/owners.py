"""The process that runs the flow run of an attempt or a batch, and whether that process has ended."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import flow_run_id as own_flow_run_id
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS


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


async def crash_dead_owner(
    flow_run_id: str | None, flow_run_count: int | None, process: str | None, since: float, *, work: str = "crew's run"
) -> None:
    """Set the flow run of an attempt or a batch to Crashed if its process ran on this machine and has ended.

    `since`: when its work began, by the crew database. The function leaves a flow run alone that has begun again or was
    resumed since, or that is paused. If the Prefect API cannot be reached, it logs that and returns.
    """
    own = own_flow_run_id()
    if flow_run_id is None or flow_run_id == own or process is None or not process_is_gone(process):
        return
    try:
        async with get_client() as client:
            flow_run = await client.read_flow_run(UUID(flow_run_id))
            state = flow_run.state
            if state is None or not state.is_running() or flow_run_count not in (None, flow_run.run_count):
                return
            if state.timestamp > moment(since):  # another process may go on with it
                return
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
