"""`serve` as a process: what it says, what it answers, how it ends; and the project that `init` writes."""

from __future__ import annotations

import re
import signal
import socket
import tomllib
import uuid
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from support.commands import environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process


@pytest.mark.programs
def test_a_crew_is_served_until_ctrl_c(tmp_path: Path):
    (tmp_path / "crew.yaml").write_text("name: mine\ninputs: [who]\ntasks: [{name: greet, output: 'Hello {{ who }}'}]")
    options = ("--port", "0", "--token", "given-token", "--response-format", "union", "--fault", "inputs:500@2")
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
        assert process.wait(15) == 0
        assert process.family() == []


@pytest.mark.programs
def test_the_token_of_the_environment_is_taken_and_a_random_one_shown(tmp_path: Path):
    for env, shown in (({}, False), ({"CREW_TOKEN": ""}, True)):
        command = [program("prefect-crew"), "serve", "echo", "--port", "0"]
        with Process(command, log=tmp_path / f"log-{shown}", env=environment(tmp_path, env)) as process:
            said = process.wait_for("Stop: Ctrl-C")
            assert ("CREW_TOKEN=" in said) is shown
            process.send(signal.SIGTERM)
            assert process.wait(15) == 0


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
            with httpx.Client(headers={"Authorization": f"Bearer {block.token.get_secret_value()}"}) as client:
                assert client.get(f"{block.url}/inputs").json()["inputs"] == ["text"]
            process.send(signal.SIGINT)
            assert process.wait(15) == 0


def test_a_crew_of_another_machine_is_not_replaced_by_a_served_one(here, prefect_api: PrefectServer):
    name = f"hosted-{uuid.uuid4()}"
    DeployedCrew(url="https://crew.example.com", token=SecretStr("hosted")).save(name, _sync=True)
    done = here("serve", "echo", "--port", "0", "--save", name)
    assert (done.code, f"{name!r} is stored with the URL https://crew.example.com" in done.err) == (2, True)
    assert DeployedCrew.load(name).token.get_secret_value() == "hosted"


def test_a_port_that_is_taken(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = here("serve", "echo", "--port", str(port))
    assert (done.code, f"Cannot listen on 127.0.0.1:{port}" in done.err, "--port 0" in done.err) == (1, True, True)


def test_the_help_lists_the_faults(here):
    from prefect_crew.devserver._faults import FAULTS, PLACES

    shown = here("serve", "--help").out.partition("Faults: ")[2]
    assert [name for name in (*PLACES, *FAULTS) if not re.search(rf"(?<![\w-]){name}(?![\w-])", shown)] == []
    assert "drop[-before-accept|-after-accept]" in shown
    assert max(map(len, shown.splitlines())) <= 120


# init

ROOT = Path(__file__).parents[2]
WRITTEN = {
    *("README.md", "prefect.yaml", "topics.csv", "requirements.txt", "tests/test_deployments.py"),
    *("compose.yaml", "Dockerfile", "cloud-webhook.jinja", ".env.example", ".dockerignore", ".gitignore"),
    *(f"flows/crews/{name}.yaml" for name in ("draft", "research", "review", "write")),
    *(f"flows/{path.name}" for path in (ROOT / "flows").glob("*.py")),
}


def test_a_project_is_written(here, tmp_path: Path):
    folder = tmp_path / "new" / "project"
    done = here("init", str(folder))
    assert (done.code, done.err) == (0, "")
    assert f"Wrote a project to {folder}" in done.out
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WRITTEN
    assert f"prefect-crew=={version('prefect-crew')}" in (folder / "requirements.txt").read_text()


def test_the_wheel_has_what_is_written_and_nothing_else():
    """Listed file by file: a folder would take along a .env that somebody has made to try the project."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    listed = build["targets"]["wheel"]["force-include"]
    written = {target.removeprefix("prefect_crew/starter/") for target in listed.values()}
    assert written == WRITTEN - {"requirements.txt"}


def test_what_is_there_is_not_touched(here, tmp_path: Path):
    (file := tmp_path / "file").write_text("mine")
    (folder := tmp_path / "folder").mkdir()
    (folder / ".hidden").write_text("mine")
    for taken in (file, folder):
        done = here("init", str(taken))
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"{taken} is not an empty folder. Nothing was written.")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"file", ".hidden"}
