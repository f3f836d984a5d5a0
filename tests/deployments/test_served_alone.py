"""Recovery without any worker: a flow and `recover` served by one process, as docs/guides/examples.md says."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.deployed import ROOT, command, flow_processes, wait_for_state, wait_until
from support.prefect_server import PrefectServer, connected
from support.processes import Process
from support.seen import Seen

SLOW = "name: slow\ninputs: [topic]\ntasks: [{name: t, seconds: 20, output: done}]\n"
SERVE = """
from prefect import serve

from one_crew import one_crew

from prefect_crew.operations import recover

serve(one_crew.to_deployment("served", tags=["recover-crashed"]), recover.to_deployment("crashed"))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_unattended(tmp_path: Path, prefect_template: Path | None):
    (tmp_path / "one_crew.py").write_text((ROOT / "flows" / "one_crew.py").read_text())
    (tmp_path / "mine.py").write_text(SERVE)
    with PrefectServer(tmp_path / "server", template=prefect_template) as server, CrewServer(SLOW) as crew:
        env = server.env(home=tmp_path / "home")
        block: Any = crew.crew(wait={"initial": 0.1, "max_interval": 0.5})
        with connected(server, tmp_path / "home"):
            block.save("slow", overwrite=True, _sync=True)
        seen = Seen(server)
        with Process([sys.executable, "mine.py"], log=tmp_path / "log", env=env, cwd=tmp_path) as process:
            process.wait_for("recover/crashed")
            # Served flows have the heartbeat of Prefect's own default.
            assert "no heartbeat for 540 s" in command("prefect-crew", "automations", "apply", env=env)
            parameters = '{"crew": "slow", "inputs": {"topic": "tea"}}'
            command("prefect", "deployment", "run", "one-crew/served", "--params", parameters, env=env)
            wait_until(lambda: crew.requests["status"] > 0, seconds=90, what="a crew that is waited for")
            (run,) = seen.flow_runs("one-crew")
            for pid in flow_processes(process, run["id"]):
                os.kill(pid, signal.SIGKILL)
            ended = wait_for_state(seen, run["id"], "COMPLETED", "FAILED", seconds=180)
        seen.close()
        assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
        assert ended["run_count"] == 2
        assert crew.kickoffs == 1
