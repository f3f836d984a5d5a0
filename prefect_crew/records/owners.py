"""Which process owns a claim's flow run, and whether it is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from functools import lru_cache
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Crashed

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.records.model import RunRecord

_DEAD = ("Z", "X")
"""States of a process that has ended, and of which only the entry is left."""


def this_process() -> str | None:
    """Return a name of this process that no other has, on any machine, also after a reboot; None where none is known.

    It holds the host, its boot, the namespace of its process ids (containers of one host may share all else), the
    process id and when the process started: a process id is used again.
    """
    return _process_name(os.getpid())


@lru_cache(maxsize=1)  # a fork has another id
def _process_name(pid: int) -> str | None:
    machine, started = _machine(), _started(pid)
    return None if machine is None or started is None else f"{machine} {pid} {started}"


def process_is_gone(name: str) -> bool:
    """Return whether a process is known to have ended. False wherever that is not known here."""
    machine, _, rest = name.partition(" ")
    pid, _, started = rest.partition(" ")
    try:
        return pid.isdecimal() and machine == _machine() and _started(int(pid)) != started
    except OSError:
        return False


def _machine() -> str | None:
    """Return what two processes share exactly if they see the same process ids."""
    host = socket.gethostname().replace(" ", "_")
    if sys.platform == "darwin":
        return f"{host}/{uuid.getnode():x}"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process started, in whatever unit the system tells it; None if there is none of this id.

    Raises:
        OSError: The system does not say.
    """
    if sys.platform == "darwin":
        command, env = ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)], {"LC_ALL": "C", "TZ": "UTC"}
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=env)  # noqa: S603
        state, _, started = answer.stdout.strip().partition(" ")
        return None if not state or state[0] in _DEAD else " ".join(started.split())
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in _DEAD else fields[19]


async def crash_dead_owner(record: RunRecord) -> None:
    """Set the flow run that started a run to Crashed if its process ran on this machine and is gone.

    A flow run that was started again since, or that is paused, is left alone. A Prefect API that is away does not stop
    whoever goes on with the run.
    """
    own, owner = flow_run_id(), record.flow_run_id
    if owner is None or owner == own or record.process is None or not process_is_gone(record.process):
        return
    try:
        async with get_client() as client:
            flow_run = await client.read_flow_run(UUID(owner))
            state = flow_run.state
            if state is None or not state.is_running() or flow_run.run_count != record.flow_run_count:
                return
            went_on = f"flow run {own}" if own else "a script"
            message = f"Its process ended. Its crew's run continues with {went_on}."
            await client.set_flow_run_state(flow_run.id, Crashed(message=message))
    except ObjectNotFound:
        return
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("Whether flow run %s is dead is not known: %s", owner, error)
    else:
        run_logger().warning("Flow run %s is set to Crashed: its process ended. Its crew's run continues here.", owner)
