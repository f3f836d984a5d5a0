"""The built wheel, alone in a fresh environment and an empty folder: a crew worker runs a deployed crew."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from support.deployed import ROOT
from support.environment import isolated, program
from support.prefect_server import PrefectServer, free_port
from support.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKEN = "token-of-the-wheel"
INPUTS = {"budget": "900 USD", "interests": "tiles", "duration": "3 days", "age": "34"}


class Installed:
    """The environment that the wheel is installed into, as a shell in an empty folder uses it."""

    def __init__(self, venv: Path, folder: Path, server: PrefectServer) -> None:
        self.bin = venv / "bin"
        self.folder = folder
        self.empty = folder / "empty"
        self.empty.mkdir()
        path = os.pathsep.join((str(self.bin), os.defpath))
        env = isolated(folder / "home", {"PREFECT_API_URL": server.api_url, "CREW_TOKEN": TOKEN, "PATH": path})
        self.env = {name: value for name, value in env.items() if name != "PYTHONPATH"}

    def run(self, command: str, *arguments: str) -> str:
        """Run a program of the environment, and return what it says; fail unless it succeeds."""
        done = subprocess.run(
            [self.bin / command, *arguments],
            env=self.env,
            cwd=self.empty,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"{command} {arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def start(self, command: str, *arguments: str, until: str) -> Process:
        """Start a program of the environment, and wait until it says so."""
        process = Process(
            [self.bin / command, *arguments], log=self.folder / f"{arguments[0]}.log", env=self.env, cwd=self.empty
        )
        try:
            process.wait_for(until, 90)
        except BaseException:
            process.kill()
            raise
        return process


@pytest.fixture(scope="module")
def installed(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    uv, venv = program("uv"), folder / "venv"

    def build(*arguments: str | Path) -> None:
        done = subprocess.run([uv, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"uv {arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    build("build", "--quiet", "--wheel", "--out-dir", folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    build("venv", "--quiet", "--python", program("python"), venv)
    build("pip", "install", "--quiet", "--python", venv / "bin" / "python", "-c", "constraints.txt", wheel)
    return Installed(venv, folder, prefect_server)


def test_four_commands_lead_to_a_flow_run_that_completes(installed: Installed, prefect_server: PrefectServer) -> None:
    where = installed.run("python", "-c", "import prefect_crew; print(prefect_crew.__file__)")
    assert where.startswith(str(installed.folder)), "what is tested is the wheel"
    port = str(free_port())
    pool = f"crews-{time.time_ns()}"
    with (
        installed.start("prefect-crew", "serve", "travel", "--port", port, "--token", TOKEN, until="Serving"),
        httpx.Client(base_url=prefect_server.api_url, timeout=60, trust_env=False) as api,
    ):
        installed.run("prefect-crew", "crews", "save", "wheel-travel", "--url", f"http://127.0.0.1:{port}")
        installed.run("prefect", "work-pool", "create", pool, "--type", "crew")
        with installed.start("prefect", "worker", "start", "--pool", pool, until="started!"):
            defaults = [part for name, value in INPUTS.items() for part in ("-i", f"{name}={value}")]
            installed.run("prefect-crew", "deploy", "wheel-travel", "--pool", pool, "--cron", "0 7 * * *", *defaults)
            installed.run("prefect", "deployment", "run", "deployed-crew/wheel-travel", "--watch")
            asked = {
                "work_pools": {"name": {"any_": [pool]}},
                "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
            }
            (flow_run,) = api.post("/flow_runs/filter", json=asked).raise_for_status().json()
    assert flow_run["infrastructure_pid"].startswith("CrewWorker ")
    assert list(installed.empty.iterdir()) == []
