"""`inputs`, `run` and `result`: what they write to which stream, and how they end. test_mistakes.py has the rest."""

import io
import json
import re
import signal
import time
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.tasks import kickoff_crew
from support.commands import TOKEN, Command, environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process

pytestmark = pytest.mark.usefixtures("instant_polling")


@pytest.fixture
def greet(prefect_api: PrefectServer, crews: CrewServer) -> str:
    return f"{crews.url}/greet"


def test_inputs_need_no_prefect_server_for_a_url(alone: Command, here: Command, crews: CrewServer):
    listed = alone("inputs", f"{crews.url}/greet")
    assert listed.ok == "Input\tNeeded\nwho\trequired\n"
    assert listed.err == ""
    (document,) = here("inputs", f"{crews.url}/greet", "-o", "json").json
    assert document.items() >= {"name": "who", "required": True}.items()
    assert "prefect server start" in alone("inputs", "travel").error(1)


def test_json_is_one_document_and_the_rest_goes_elsewhere(
    alone: Command, prefect_server: PrefectServer, crews: CrewServer
):
    key = f"json-{crews.port}"
    env = {"PREFECT_API_URL": prefect_server.api_url}
    done = alone("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", key, "-o", "json", env=env)
    document = done.json
    assert document.items() >= {"output": "**Hello** Ada", "state": "completed", "idempotency_key": key}.items()
    assert [task["name"] for task in document["tasks"]] == ["think", "speak"]
    assert document["flow_run_url"].endswith(document["flow_run_id"])
    assert "raw" not in document
    assert f"kicked off run {document['kickoff_id']}" in done.err
    assert "completed after" in done.err
    assert not re.search(f"{TOKEN}|Traceback|INFO|Beginning flow run|Finished in state", done.err)


@pytest.mark.parametrize("option", [("-f", "-"), ("--input-file", "-"), ("-f-",)])
def test_inputs_come_from_standard_input(
    here: Command, greet: str, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
):
    monkeypatch.setattr("sys.stdin", io.StringIO("who: Ada"))
    assert "**Hello** Ada" in here("run", greet, *option).out


def test_a_key_finds_its_run_and_its_result_again(here: Command, greet: str, crews: CrewServer):
    eve = ("run", greet, "-i", "who=Eve", "--key", "key of eve")
    first, again = here(*eve), here(*eve)
    assert first.ok == again.ok == "**Hello** Eve\n"
    assert crews.kickoffs_by_key["key of eve"] == 1
    assert "kicked off run" in first.err
    assert "found run" in again.err
    pages = [re.findall(r"/runs/flow-run/[0-9a-f-]+", done.err) for done in (first, again)]
    assert pages[0] != pages[1], "each prints its own flow run"
    assert here("result", "key of eve").out == "**Hello** Eve\n"
    assert here("result", "key of eve", "-o", "json").json["output"] == "**Hello** Eve"
    assert here(*eve, "--force-new", "--yes").code == 0
    assert len([key for key in crews.kickoffs_by_key if key.startswith("key of eve")]) == 2
    other = here("run", greet, "-i", "who=Bob", "--key", "key of eve")
    assert "prefect-crew runs inspect 'key of eve'" in other.error(1)


def test_a_state_to_restore(here: Command, greet: str, crews: CrewServer):
    state = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
    line = ("-i", "who=Ada", "--restore-from", state)
    assert here("run", greet, *line).code == 0
    last = crews.run([*crews.accepted][-1])
    assert last.inputs == {"who": "Ada"}
    assert last.restore_from == state


def test_a_failed_crew(here: Command, prefect_api: PrefectServer, crews: CrewServer):
    done = here("run", f"{crews.url}/broken", "-i", "who=Ada")
    for part in ("no idea who Ada is", "attempt 1 of at most 3", "/runs/flow-run/"):
        assert part in done.error(3)
    assert done.out == ""
    assert "Traceback" not in done.err
    (key,) = re.findall(r"^Idempotency key (.+)$", done.err, re.MULTILINE)
    again = here("run", f"{crews.url}/broken", "-i", "who=Ada", "--key", key)
    assert "attempt 2 of at most 3" in again.err


def test_a_server_that_is_down_is_tried_again(
    here: Command, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff_crew, "retry_delay_seconds", [0.05, 0.1, 0.15])
    done = here("run", "http://127.0.0.1:1", "-i", "who=Ada")
    assert done.error(1).count("The crew's inputs could not be checked before the kickoff") == 4
    assert "Traceback" not in done.err


def test_a_timeout_leaves_the_crew_running(here: Command, prefect_api: PrefectServer, crews: CrewServer):
    done = here("run", f"{crews.url}/slow", "-i", "who=Ada", "--timeout", "0.3", "-o", "json")
    assert "left running" in done.error(5)
    assert str(crews.run(done.json["error"]["kickoff_id"]).state) == "running"


@pytest.mark.programs
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_crew_running(
    crews: CrewServer, prefect_api: PrefectServer, tmp_path: Path, number: int, code: int
):
    url, key = f"{crews.url}/slow", f"{number}-{time.time()}"
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url})
    command = [program("prefect-crew"), "run", url, "-i", "who=Ada", "--key", key, "-o", "json"]
    with Process(command, log=tmp_path / "log", env=env) as process:
        process.wait_for("(0 of 1 tasks done)")
        process.send(number)
        assert process.wait() == code
        assert process.family() == []
    (run,) = [run for run in crews.runs if run.meta and run.meta.get("idempotency_key") == key]
    assert str(run.state) == "running", process.output
    assert f"To stop the crew, run: prefect-crew runs cancel {run.id} --crew {url}" in process.output.replace("\n", " ")
    assert "Traceback" not in process.output
    document, _ = json.JSONDecoder().raw_decode(process.output, process.output.index('{\n  "error"'))
    assert document["error"].items() >= {"kickoff_id": run.id, "idempotency_key": key, "exit_code": code}.items()
    assert "is left running" in process.output
