"""`serve` as a process: what it says, what it answers, how it ends; and the project that `init` writes."""

import re
import signal
import sys
import tomllib
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from support.commands import Command, environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process
from support.terminals import Terminal


@pytest.mark.programs
def test_a_crew_is_served_until_ctrl_c(tmp_path: Path):
    (tmp_path / "crew.yaml").write_text("name: mine\ninputs: [who]\ntasks: [{name: greet, output: 'Hello {{ who }}'}]")
    options = ("--port", "0", "--token", "given-token", "--response-format", "live", "--fault", "inputs:500@2")
    command = [program("prefect-crew"), "serve", "crew.yaml", *options]
    with Process(command, log=tmp_path / "log", env=environment(tmp_path), cwd=tmp_path) as process:
        url = re.search(r"Serving the crew mine at (http://127\.0\.0\.1:\d+)", process.wait_for("Stop: Ctrl-C"))[1]  # type: ignore[index]
        headers = {"Authorization": "Bearer given-token"}
        assert httpx.get(f"{url}/inputs").status_code == 401
        assert httpx.get(f"{url}/inputs", headers=headers).json()["inputs"] == ["who"]
        assert httpx.get(f"{url}/inputs", headers=headers).status_code == 500
        kickoff_id = httpx.post(f"{url}/kickoff", headers=headers, json={"inputs": {"who": "Ada"}}).json()["kickoff_id"]
        assert "state" in httpx.get(f"{url}/status/{kickoff_id}", headers=headers).json()
        assert "given-token" not in process.output
        process.send(signal.SIGINT)
        assert process.wait() == 0
        assert process.family() == []


@pytest.mark.programs
@pytest.mark.parametrize(("token", "shown"), [("", True)], ids=["random"])
def test_only_a_random_token_is_shown(tmp_path: Path, token: str, shown: bool):
    command = [program("prefect-crew"), "serve", "echo", "--port", "0"]
    with Process(command, log=tmp_path / "log", env=environment(tmp_path, {"CREW_TOKEN": token})) as process:
        assert ("CREW_TOKEN=" in process.wait_for("Stop: Ctrl-C")) is shown
        process.send(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.programs
@pytest.mark.skipif(sys.platform == "win32", reason="it needs a terminal of Unix")
def test_a_terminal_shows_each_kickoff_id(tmp_path: Path):
    command = [program("prefect-crew"), "serve", "echo", "--port", "0", "--token", "given-token"]
    with Terminal(command, env=environment(tmp_path)) as terminal:
        terminal.wait_for("Stop: Ctrl-C")
        url = re.search(r"http://127\.0\.0\.1:\d+", terminal.output)[0]  # type: ignore[index]
        headers = {"Authorization": "Bearer given-token"}
        kickoff_id = httpx.post(f"{url}/kickoff", headers=headers, json={"inputs": {"text": "a"}}).json()["kickoff_id"]
        terminal.wait_for(f"Started run {kickoff_id}")


@pytest.mark.programs
def test_the_served_crew_is_stored(prefect_api: PrefectServer, tmp_path: Path):
    name = f"served-{uuid.uuid4()}"
    command = [program("prefect-crew"), "serve", "echo", "--port", "0", "--save", name]
    for attempt in range(2):  # the second server has another port and another token
        env = environment(tmp_path, {"CREW_TOKEN": "", **prefect_api.env()})
        with Process(command, log=tmp_path / f"log-{attempt}", env=env) as process:
            output = process.wait_for("Stop: Ctrl-C")
            assert f"deployed-crew/{name}" in output
            assert f"Try: prefect-crew run {name} -i text=…" in output
            assert "CREW_TOKEN=" not in output
            block = DeployedCrew.load(name)
            headers = {"Authorization": f"Bearer {block.token.get_secret_value()}"}
            assert httpx.get(f"{block.url}/inputs", headers=headers).json()["inputs"] == ["text"]


def test_a_crew_of_another_machine_is_not_replaced_by_a_served_one(here: Command, prefect_api: PrefectServer):
    name = f"hosted-{uuid.uuid4()}"
    block: Any = DeployedCrew(url="https://crew.example.com", token=SecretStr("hosted"))
    block.save(name, _sync=True)
    error = here("serve", "echo", "--port", "0", "--save", name).error(2)
    assert f"{name!r} is stored with the URL https://crew.example.com" in error
    assert DeployedCrew.load(name).token.get_secret_value() == "hosted"


# init

ROOT = Path(__file__).parents[2]
WRITTEN = {
    *("README.md", "prefect.yaml", "topics.csv", "requirements.txt", "tests/test_deployments.py"),
    *("compose.yaml", "Dockerfile", "cloud-webhook.jinja", ".env.example", ".dockerignore", ".gitignore"),
    *(f"flows/crews/{name}.yaml" for name in ("draft", "research", "review", "write")),
    *(f"flows/{path.name}" for path in (ROOT / "flows").glob("*.py")),
}


def test_a_project_is_written(here: Command, tmp_path: Path):
    folder = tmp_path / "new" / "project"
    assert f"Wrote a project to {folder}" in here("init", str(folder)).ok
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WRITTEN
    assert f"prefect-crew[postgres]=={version('prefect-crew')}" in (folder / "requirements.txt").read_text()


def test_the_wheel_has_what_is_written_and_nothing_else():
    """Listed file by file: a folder would take along a .env that somebody has made to try the project."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    listed = build["targets"]["wheel"]["force-include"]
    written = {target.removeprefix("prefect_crew/starter/") for target in listed.values()}
    assert written == WRITTEN - {"requirements.txt"}
