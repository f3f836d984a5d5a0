"""The flows of flows/ and the deployments of deployments/, as the tests run them."""

import contextlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.flows import load_flow_from_entrypoint

from support.environment import program
from support.processes import Process
from support.seen import Seen
from support.waiting import TooLateError, wait_until

ROOT = Path(__file__).parents[2]
FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


def load_flow(entrypoint: str) -> Any:
    """Return a flow of flows/, such as `one_crew.py:one_crew`, loaded as a worker loads it."""
    return load_flow_from_entrypoint(str(ROOT / "flows" / entrypoint), use_placeholder_flow=False)


def command(*arguments: str | Path, env: Mapping[str, str], cwd: Path = ROOT, timeout: float = 180.0) -> str:
    """Run a program of this environment and return all that it wrote; fail with that if it fails."""
    done = subprocess.run(
        [program(str(arguments[0])), *map(str, arguments[1:])],
        cwd=cwd,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


def flow_processes(process: Process, flow_run_id: Any) -> list[int]:
    """Return the ids of the processes that a worker or a served flow runs a flow run in; empty before and after.

    A worker names the flow run in their environment; a served flow sets it within, so that all its children count.
    """
    children = [pid for pid in process.family() if pid != process.pid]
    return [pid for pid in children if str(flow_run_id) in _environ(pid)] or children


def _environ(pid: int) -> str:
    # It may end between two looks.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return ""


def wait_for_state(seen: Seen, flow_run_id: Any, *states: str, name: str | None = None) -> dict[str, Any]:
    """Wait until a flow run is in one of these types of states, any final one if left out, and return it."""
    wanted, run = set(states) or FINAL, dict[str, Any]()

    def look() -> bool:
        run.update(seen.flow_run(flow_run_id))
        return run["state_type"] in wanted and name in (None, run["state_name"])

    try:
        wait_until(look, f"flow run {flow_run_id} in {sorted(wanted)}")
    except TooLateError as error:
        raise TooLateError(f"{error}: it is {run['state']}") from None
    return run
