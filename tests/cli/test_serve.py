"""`serve` as a process: what it says, what it answers, how it ends."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import httpx

from support.commands import environment
from support.environment import program
from support.processes import Process


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


def test_the_token_of_the_environment_is_taken_and_a_random_one_shown(tmp_path: Path):
    for env, shown in (({}, False), ({"CREW_TOKEN": ""}, True)):
        command = [program("prefect-crew"), "serve", "echo", "--port", "0"]
        with Process(command, log=tmp_path / f"log-{shown}", env=environment(tmp_path, env)) as process:
            said = process.wait_for("Stop: Ctrl-C")
            assert ("CREW_TOKEN=" in said) is shown
            process.send(signal.SIGTERM)
            assert process.wait(15) == 0


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
