"""The server as a process of its own: its line, its end, and its death."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver.faults import FaultError
from prefect_crew.devserver.programs import load_program
from prefect_crew.devserver.runs import ProgramNotFoundError
from prefect_crew.devserver.scripts import ScriptedProgram, ScriptError
from prefect_crew.devserver.server import serve
from prefect_crew.devserver.state import CRASH_EXIT_CODE


class Served:
    """A process that runs `serve`; its line is read when it is first asked for."""

    def __init__(self, **options: Any) -> None:
        code = (
            f"from prefect_crew.devserver.server import serve; raise SystemExit(serve(**{ ({'port': 0} | options)!r}))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @functools.cached_property
    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    @property
    def url(self) -> str:
        found = re.search(r"http://\S+", self.line)
        assert found, self.process.communicate()[1]
        return found[0]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Start all processes of this module at once: most of a start is importing."""
    journal = str(tmp_path_factory.mktemp("journals") / "journal")
    crashing = {"spec": "echo", "token": "t", "journal": f"{journal}-of-a-crash"}
    started = {
        "SIGINT": Served(spec="travel"),
        "SIGTERM": Served(spec="travel"),
        "options": Served(
            spec="echo",
            token="s3cret",
            dialect="union",
            generation="later",
            faults=["status:500@1", "any:latency=0.01%0.5"],
            seed=7,
            speed=100,
            journal=journal,
            inspect=True,
            status_paths=["/{id}/status"],
            no_stop=True,
        ),
        "crashes": Served(**crashing, faults=["kickoff:crash-after-accept@1"]),
    }
    yield {**started, "again": functools.partial(Served, **crashing, inspect=True)}
    for one in started.values():
        one.end()


def token_in(line: str) -> dict[str, str]:
    found = re.search(r"CREW_TOKEN=(\S+)", line)
    assert found
    return {"Authorization": f"Bearer {found[1]}"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_line_then_a_clean_end(served: dict[str, Any], name: str) -> None:
    one = served[name]
    line, url, headers = one.line, one.url, token_in(one.line)
    assert line.startswith(f"Serving the crew travel at {url}  Try: CREW_TOKEN=")
    assert f"prefect-crew run {url} -i budget=… -i interests=… -i duration=… -i age=…" in line
    body = {"inputs": {"budget": "1", "interests": "x", "duration": "1", "age": "1"}}
    kickoff_id = httpx.post(f"{url}/kickoff", headers=headers, json=body).json()["kickoff_id"]
    assert httpx.get(f"{url}/status/{kickoff_id}", headers=headers).json()["status"] == "running"
    assert httpx.get(f"{url}/_test/requests", headers=headers).status_code == 404
    one.process.send_signal(signal.Signals[name])
    out, err = one.process.communicate(timeout=10)
    assert (one.process.returncode, out, err) == (0, "", "")


def test_a_given_token_is_not_shown_and_all_options_count(served: dict[str, Any]) -> None:
    one = served["options"]
    assert "s3cret" not in one.line
    with httpx.Client(base_url=one.url, headers={"Authorization": "Bearer s3cret"}) as client:
        kickoff = client.post("/kickoff", json={"inputs": {"text": "x"}, "meta": {"idempotency_key": "a"}})
        kickoff_id = kickoff.json()["kickoff_id"]
        assert client.get(f"/status/{kickoff_id}").status_code == 404
        assert client.get(f"/{kickoff_id}/status").status_code == 500
        assert client.get(f"/{kickoff_id}/status").json()["state"] == "SUCCESS"
        assert client.post(f"/stop/{kickoff_id}").status_code == 404
        seen = client.get("/_test/requests").json()
    assert seen["kickoffs_by_key"] == {"a": 1}
    assert seen["requests"] == {"kickoff": 1, "status": 2}
    assert seen["answers"] == {"kickoff 200": 1, "status 500": 1, "status 200": 1}
    assert {"fault": "status:500@1", "occurrence": 1} in seen["faults"]
    assert seen["runs"] == [
        {
            "id": kickoff_id,
            "state": "completed",
            "meta": {"idempotency_key": "a"},
            "inputs": {"text": "x"},
            "restore_from": None,
        }
    ]
    assert httpx.get(f"{one.url}/_test/requests").status_code == 401


def test_a_process_that_dies_and_comes_back(served: dict[str, Any]) -> None:
    headers = {"Authorization": "Bearer t"}
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{served['crashes'].url}/kickoff", headers=headers, json={"inputs": {"text": "x"}})
    assert served["crashes"].process.wait(10) == CRASH_EXIT_CODE
    again = served["again"]()
    try:
        deadline = time.monotonic() + 10
        url = f"{again.url}/_test/requests"
        while (seen := httpx.get(url, headers=headers).json())["runs"][0]["state"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        again.end()
    assert seen["kickoffs"] == 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        pytest.param(
            {"spec": "nowhere.yaml"}, ScriptError, r"Cannot read the crew nowhere.yaml.*echo, travel", id="no-file"
        ),
        pytest.param({"faults": ["kickoff:explode"]}, FaultError, "There is no fault 'explode'", id="fault"),
        pytest.param({"dialect": "klingon"}, ValueError, "documented, union, live", id="dialect"),
        pytest.param({"generation": "next"}, ValueError, "first or later", id="generation"),
        pytest.param({"on_crash": "panic"}, ValueError, "rerun or lose", id="on-crash"),
        pytest.param({"status_paths": ["/state/{id}"]}, ValueError, "status_paths must be", id="status-path"),
        pytest.param({"speed": 0}, ValueError, "speed must be above 0", id="speed"),
        pytest.param({"journal": "no/such/folder/journal"}, OSError, "No such file or directory", id="journal"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_starts(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        serve(**{"port": 0} | options)


def test_a_taken_port() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            serve("echo", port=taken.getsockname()[1])


def test_crewai_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == "crewai" or name.startswith("prefect_crew.devserver.crewai_runner")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "crewai", None)
    with pytest.raises(ProgramNotFoundError, match=re.escape("pip install 'prefect-crew[crewai]'")):
        load_program("json:dumps")


def test_programs_are_found_by_name_by_path_and_by_text(tmp_path: Path) -> None:
    text = "name: mine\ntasks: [{name: t}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    for spec in ("echo", str(tmp_path / "mine.yaml"), tmp_path / "mine.yaml", text):
        program = load_program(spec, speed=3)
        assert isinstance(program, ScriptedProgram)
        assert program.speed == 3
        assert program.name == ("echo" if spec == "echo" else "mine")
        assert load_program(program) is program
