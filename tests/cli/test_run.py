"""`run` and `result` on a real Prefect server: results, ends, keys, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from support.commands import TOKEN, environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process

pytestmark = pytest.mark.usefixtures("instant_polling")


@pytest.fixture
def greet(prefect_api: PrefectServer, crews: CrewServer) -> str:
    return f"{crews.url}/greet"


def test_json_is_one_document_and_the_rest_goes_elsewhere(apart, crews: CrewServer):
    key = f"json-{crews.port}"
    done = apart("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", key, "--json")
    assert done.code == 0
    document = done.json
    assert document["output"] == "**Hello** Ada"
    assert document["state"] == "completed"
    assert document["idempotency_key"] == key
    assert [task["name"] for task in document["tasks"]] == ["think", "speak"]
    assert document["flow_run_url"].endswith(document["flow_run_id"])
    assert "raw" not in document
    assert f"kicked off run {document['kickoff_id']}" in done.err
    assert "completed after" in done.err
    assert TOKEN not in done.err
    for noise in ("Traceback", "INFO", "Beginning flow run", "Finished in state"):
        assert noise not in done.err


def test_a_run_writes_its_text_alone(here, greet: str):
    done = here("run", greet, "-i", "who=Ada")
    assert (done.code, done.out) == (0, "**Hello** Ada\n")
    assert "/runs/flow-run/" in done.err


def test_a_key_finds_its_run_and_its_result_again(here, greet: str, crews: CrewServer, tmp_path: Path):
    first = here("run", greet, "-i", "who=Eve", "--key", "key of eve", "--output-file", str(tmp_path / "eve.md"))
    again = here("run", greet, "-i", "who=Eve", "--key", "key of eve")
    assert (first.code, again.code) == (0, 0)
    assert crews.kickoffs_by_key["key of eve"] == 1
    assert "kicked off run" in first.err
    assert "found run" in again.err
    pages = [re.findall(r"/runs/flow-run/[0-9a-f-]+", done.err) for done in (first, again)]
    assert pages[0] != pages[1], "each prints its own flow run"
    assert (tmp_path / "eve.md").read_text() == "**Hello** Eve"
    assert here("result", "key of eve").out == "**Hello** Eve\n"
    assert here("result", "key of eve", "--json").json["output"] == "**Hello** Eve"
    assert here("run", greet, "-i", "who=Eve", "--key", "key of eve", "--force-new").code == 0
    assert crews.kickoffs_by_key["key of eve"] == 2
    other = here("run", greet, "-i", "who=Bob", "--key", "key of eve")
    assert other.code == 15
    assert "prefect-crew runs show 'key of eve'" in other.err


READ_ONLY = [] if os.geteuid() == 0 else ["read-only"]  # root may write to any file


@pytest.mark.parametrize("kind", ["folder", "nowhere", "below-a-file", *READ_ONLY])
def test_an_output_file_that_cannot_be_written_starts_nothing(
    here, greet: str, crews: CrewServer, tmp_path: Path, kind: str
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "read-only").write_text("old")
    (tmp_path / "read-only").chmod(0o400)
    path = {"nowhere": tmp_path / "nowhere" / "x.md", "below-a-file": tmp_path / "read-only" / "x.md"}.get(
        kind, tmp_path / kind
    )
    before = crews.kickoffs
    for line in (("run", greet, "-i", "who=Ada"), ("result", "any key")):
        done = here(*line, "--output-file", str(path))
        assert done.code == 26
        assert f"{path} cannot be written" in done.err
    assert crews.kickoffs == before


def test_no_empty_file_is_left_where_the_run_is_refused(here, greet: str, tmp_path: Path):
    assert here("run", greet, "--output-file", str(tmp_path / "x.md")).code == 16
    assert not (tmp_path / "x.md").exists()
    (tmp_path / "old.md").write_text("old")
    assert here("run", greet, "--output-file", str(tmp_path / "old.md")).code == 16
    assert (tmp_path / "old.md").read_text() == "old"


def test_a_result_that_cannot_be_written_after_all_is_shown(
    here, greet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefect_crew.cli.run.create_private", full)
    done = here("run", greet, "-i", "who=Ada", "--output-file", str(tmp_path / "x.md"))
    assert (done.code, done.out) == (26, "**Hello** Ada\n")
    assert "x.md cannot be written: No space left on device" in done.err


def test_inputs_from_a_file(here, greet: str, tmp_path: Path):
    (tmp_path / "in.yaml").write_text("who: Grace")
    assert here("run", greet, "--inputs", str(tmp_path / "in.yaml")).out == "**Hello** Grace\n"


def test_missing_inputs_start_nothing(here, greet: str, crews: CrewServer):
    before = crews.kickoffs
    done = here("run", greet, "--json")
    assert done.code == 16
    assert "Missing inputs: who" in done.json["error"]["message"]
    assert crews.kickoffs == before


def test_an_unknown_input_starts_nothing_unless_extra_ones_are_allowed(here, greet: str, crews: CrewServer):
    before = crews.kickoffs
    line = ("run", greet, "-i", "who=Ada", "-i", "colour=red")
    done = here(*line)
    assert done.code == 16
    assert "Unknown inputs: colour. The crew takes: who. Nothing was started." in done.err
    assert "--allow-extra" in done.err
    assert crews.kickoffs == before
    assert here(*line, "--allow-extra").code == 0
    assert [*crews.runtime.crews["greet"]][-1].inputs == {"who": "Ada", "colour": "red"}


def test_a_state_to_restore(here, greet: str, crews: CrewServer):
    state = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
    assert here("run", greet, "-i", "who=Ada", "--restore-from", state).code == 0
    assert [*crews.runtime.crews["greet"]][-1].restore_from == state
    wrong = here("run", greet, "-i", "who=Ada", "--restore-from", "42")
    assert wrong.code == 25
    assert "restore_from is '42'" in wrong.err


def test_a_failed_crew(here, prefect_api: PrefectServer, crews: CrewServer):
    done = here("run", f"{crews.url}/broken", "-i", "who=Ada")
    assert done.code == 10
    assert "no idea who Ada is" in done.err
    assert "attempt 1 of at most 3" in done.err
    assert "/runs/flow-run/" in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


def test_a_server_that_is_down_is_tried_again_and_it_is_said(
    here, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
):
    from prefect_crew.tasks import kickoff_crew

    monkeypatch.setattr(kickoff_crew, "retry_delay_seconds", [0.05, 0.1, 0.15])
    done = here("run", "http://127.0.0.1:1", "-i", "who=Ada")
    assert done.code == 21
    retries = re.findall(r"failed \(CrewConnectionError\)\. (Retry \d of 3 in [\d.]+ s)\.", done.err)
    assert retries == ["Retry 1 of 3 in 0.05 s", "Retry 2 of 3 in 0.1 s", "Retry 3 of 3 in 0.15 s"]
    assert done.err.count("The crew's inputs could not be checked before the kickoff") == 1
    assert done.err.count("POST http://127.0.0.1:1/kickoff got no answer") == 1


def test_a_timeout_leaves_the_crew_running(here, prefect_api: PrefectServer, crews: CrewServer):
    done = here("run", f"{crews.url}/slow", "-i", "who=Ada", "--timeout", "0.3", "--json")
    assert done.code == 13
    kickoff_id = done.json["error"]["kickoff_id"]
    assert "left running" in done.err
    assert here("status", f"{crews.url}/slow", kickoff_id, "--json").json["state"] == "running"
    assert here("stop", f"{crews.url}/slow", kickoff_id).code == 0


@pytest.mark.parametrize("timeout", ["0", "-1"])
def test_a_timeout_that_makes_no_sense(here, greet: str, timeout: str):
    done = here("run", greet, "-i", "who=Ada", "--timeout", timeout)
    assert done.code == 25
    assert "timeout" in done.err


def test_a_idempotency_key_that_makes_no_sense(here, greet: str):
    done = here("run", greet, "-i", "who=Ada", "--key", "{{ tomorrow }}")
    assert done.code == 25
    assert "scheduled_start" in done.err


def test_no_result_under_a_key_that_nobody_used(here, prefect_api: PrefectServer):
    assert here("result", "never used").code == 27


def test_a_prefect_api_that_is_away_is_a_paragraph(here, crews: CrewServer, away: None):
    done = here("run", f"{crews.url}/greet", "-i", "who=Ada", "--json")
    assert done.code == 30
    assert done.json["error"]["exit_code"] == 30
    assert "http://127.0.0.1:1/api does not answer" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("number", "code", "state"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "running")]
)
def test_only_ctrl_c_stops_the_crew(
    here, crews: CrewServer, prefect_server: PrefectServer, tmp_path: Path, number: int, code: int, state: str
):
    url, key = f"{crews.url}/slow", f"{number}-{time.time()}"
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_server.api_url})
    command = [program("prefect-crew"), "run", url, "-i", "who=Ada", "--key", key, "--json"]
    with Process(command, log=tmp_path / "log", env=env) as process:
        process.wait_for("(0 of 1 tasks done)")
        process.send(number)
        assert process.wait(30) == code
        assert process.family() == []
    (run,) = [run for run in crews.runs if run.meta and run.meta.get("idempotency_key") == key]
    told = here("status", url, run.id, "--json").json["state"]
    here("stop", url, run.id)
    assert told == state, process.output
    assert "Traceback" not in process.output
    document, _ = json.JSONDecoder().raw_decode(process.output, process.output.index('{\n  "error"'))
    assert document["error"].items() >= {"kickoff_id": run.id, "idempotency_key": key, "exit_code": code}.items()
    assert ("was asked to stop: stopped" if number == signal.SIGINT else "is left running") in process.output
