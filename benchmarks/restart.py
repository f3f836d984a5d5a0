"""Seconds from SIGKILL to the run being waited for again, for each way in which a flow runs.

A crew that goes on for long is kicked off and waited for. Then the process that waits is killed, and whatever a person
does is done at once: a script is called again, a flow run retried (`prefect flow-run retry`) as soon as Prefect knows
that it has crashed. `waited_for_seconds`, measured on the crew's server, is from the kill to the first status request
that follows; `known_seconds` until Prefect knows of it. It starts its own Prefect server, worker and served flow, with
a look for work every second, and needs the repository's tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from figures import report

from prefect_crew.devserver import CrewServer
from proof.ways import WAYS, Ways, waited_for
from support.deployed import flow_processes
from support.prefect_server import PrefectServer, connected

CREW = "name: slow\ninputs: [text]\ntasks: [{name: t, seconds: 600, output: done}]\n"
SCRIPT = """
import json, sys
from prefect_crew import DeployedCrew, run_crew
crew, key = json.loads(sys.argv[1])
run_crew(DeployedCrew(**crew), {"text": "tea"}, idempotency_key=key)
"""
POLLS = {"initial": 0.2, "max_interval": 0.5}


def of_a_script(server: PrefectServer, folder: Path) -> tuple[float, float]:
    with CrewServer(CREW) as crew:
        fields: dict[str, Any] = {"url": crew.url, "token": crew.token, "wait": POLLS}
        command = [sys.executable, "-c", SCRIPT, json.dumps([fields, f"key-{time.time()}"])]

        def start() -> subprocess.Popen[bytes]:
            env = server.env(home=folder / "home")
            return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        first = start()
        waited_for(crew, 1)
        first.kill()
        killed, asked = time.monotonic(), crew.requests["status"]
        first.wait()
        second = start()
        waited_for(crew, asked)
        seconds = time.monotonic() - killed
        assert crew.kickoffs == 1
        second.kill()
        second.wait()
        return 0.0, seconds


def of_a_flow(ways: Ways, name: str) -> tuple[float, float]:
    way = ways.way(name)
    with CrewServer(CREW) as crew, connected(ways.server, ways.folder / "home"):
        block: Any = crew.crew(wait=POLLS)
        block.save("restart", overwrite=True)
        run_id = ways.start(way, {"crew": "restart", "kill_file": str(ways.folder / "nobody")})
        waited_for(crew, 1)
        for pid in flow_processes(way.process, run_id):
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(0.3)  # a request that had left
        asked = crew.requests["status"]
        ways.crashed(way, run_id)
        known = time.monotonic() - killed
        ways.retry(run_id)
        waited_for(crew, asked)
        seconds = time.monotonic() - killed
        assert crew.kickoffs == 1
        ways.seen.set_state(run_id, "CANCELLED")
        for pid in flow_processes(way.process, run_id):
            os.kill(pid, signal.SIGKILL)
        return known, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="kills for each way")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with PrefectServer(folder / "prefect") as server, Ways(server, folder) as ways:
            for way in ("script", *WAYS):
                figures = [
                    of_a_script(server, folder) if way == "script" else of_a_flow(ways, way) for _ in range(times)
                ]
                known, again = (median(column) for column in zip(*figures, strict=True))
                report(way, times=times, known_seconds=known, waited_for_seconds=again)


if __name__ == "__main__":
    main()
