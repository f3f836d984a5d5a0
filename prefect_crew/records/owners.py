"""Which process or flow run owns a claim, and whether it can still send its kickoff."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import get_current_settings
from prefect.states import Crashed

from prefect_crew._internal.prefect_api import flow_run_id, run_logger

if TYPE_CHECKING:
    from prefect_crew.records.model import RunRecord


_DEAD = ("Z", "X")
"""States of a process that has ended, and of which only the entry is left."""
MISSED = 3
"""Heartbeats in a row that a flow run misses before it counts as dead."""
USUAL = 180
"""Seconds between two heartbeats, as Prefect comes."""
LATE = timedelta(seconds=10)
"""How late a heartbeat may be recorded."""


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
    """Return whether a process is known to have ended. False wherever that cannot be told from here."""
    machine, _, rest = name.partition(" ")
    pid, _, started = rest.partition(" ")
    if not pid.isdecimal() or machine != _machine():
        return False
    try:
        return _started(int(pid)) != started
    except OSError:
        return False


def _machine() -> str | None:
    """Return what two processes share exactly if they see the same process ids."""
    host = socket.gethostname().replace(" ", "_")
    if sys.platform == "linux":
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{host}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
        except OSError:
            return None
    if sys.platform == "darwin":
        return f"{host}/{uuid.getnode():x}"
    return None


def _started(pid: int) -> str | None:
    """Return when a process started, in whatever unit the system tells it; None if there is none of this id.

    Raises:
        OSError: The system does not say.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # the name before may hold anything
        return None if fields[0] in _DEAD else fields[19]
    command = ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)]
    env = {"LC_ALL": "C", "TZ": "UTC"}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=env)  # noqa: S603
    state, _, started = answer.stdout.strip().partition(" ")
    return None if not state or state[0] in _DEAD else " ".join(started.split())


async def crash_dead_owner(record: RunRecord) -> None:
    """Set the flow run that started a run to Crashed if it is known to be dead.

    That is where its process ran on this machine and is gone, or where it has missed three heartbeats. A flow run that
    was started again since, that is paused, or that sends no heartbeats is left alone. A Prefect API that is away does
    not stop whoever goes on with the run.
    """
    own = flow_run_id()
    if record.flow_run_id is None or record.flow_run_id == own:
        return
    try:
        async with get_client() as client:
            await _crash_if_dead(client, record, UUID(record.flow_run_id), own)
    except ObjectNotFound:
        return
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("Whether flow run %s is dead is not known: %s", record.flow_run_id, error)


async def _crash_if_dead(client: PrefectClient, record: RunRecord, owner: UUID, own: str | None) -> None:
    flow_run = await client.read_flow_run(owner)
    state = flow_run.state
    if state is None or not state.is_running() or flow_run.run_count != record.flow_run_count:
        return
    if record.process is not None and process_is_gone(record.process):
        why = "Its process is gone"
    elif await _is_silent(client, owner):
        why = f"It has missed {MISSED} heartbeats"
    else:
        return
    went_on = f"flow run {own}" if own else "a script"
    await client.set_flow_run_state(owner, Crashed(message=f"{why}. Its crew's run goes on with {went_on}."))
    run_logger().warning("Flow run %s is set to Crashed. %s. Its crew's run is found and goes on here.", owner, why)


async def _is_silent(client: PrefectClient, owner: UUID) -> bool:
    """Return whether a flow run that used to send heartbeats has missed some, by the server's clock alone."""
    response = await client.request(
        "POST",
        "/events/filter",
        json={
            "filter": {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{owner}"]},
            },
            "limit": MISSED + 1,
        },
    )
    events: list[dict[str, Any]] = response.json()["events"]
    beats = sorted(datetime.fromisoformat(str(event["received"])) for event in events)
    if not beats or "Date" not in response.headers:
        return False
    gaps = [(after - before).total_seconds() for before, after in pairwise(beats)]
    usual = max(gaps, default=0.0) or float(get_current_settings().flows.heartbeat_frequency or USUAL)
    return parsedate_to_datetime(response.headers["Date"]) - beats[-1] > MISSED * timedelta(seconds=usual) + LATE
