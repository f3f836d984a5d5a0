"""Which operating system process this is, and whether one that was named earlier is known to be gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from functools import lru_cache
from pathlib import Path

__all__ = ["process_is_gone", "this_process"]

_ENDED = ("Z", "X")
"""States of a process that has ended, and of which only the entry is left."""


def this_process() -> str | None:
    """Return a name of this process that no other has, on any machine, also after a reboot; None where none is known.

    It holds the host, its boot, the namespace of its process ids (containers of one host may share all else), the
    process id and when the process started: a process id is used again.
    """
    return _name(os.getpid())


@lru_cache(maxsize=1)  # a fork has another id
def _name(pid: int) -> str | None:
    where, started = _where(), _started(pid)
    return None if where is None or started is None else f"{where} {pid} {started}"


def process_is_gone(name: str) -> bool:
    """Return whether a process is known to have ended. False wherever that cannot be told from here."""
    where, _, rest = name.partition(" ")
    pid, _, started = rest.partition(" ")
    if not pid.isdecimal() or where != _where():
        return False
    try:
        return _started(int(pid)) != started
    except OSError:
        return False


def _where() -> str | None:
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
        return None if fields[0] in _ENDED else fields[19]
    answer = subprocess.run(  # noqa: S603
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "TZ": "UTC"},
    )
    state, _, started = answer.stdout.strip().partition(" ")
    return None if not state or state[0] in _ENDED else " ".join(started.split())
