"""inputs, status, resume and stop: with a URL, and without any Prefect server."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from prefect_crew.devserver import CrewServer
from support.commands import TOKEN, Finished


def kicked_off(crews: CrewServer, crew: str) -> str:
    answer = httpx.post(f"{crews.url}/{crew}/kickoff", headers=crews.headers, json={"inputs": {"who": "Ada"}})
    return answer.json()["kickoff_id"]


def until(crews: CrewServer, crew: str, kickoff_id: str, *words: str) -> None:
    for _ in range(200):
        body = httpx.get(f"{crews.url}/{crew}/status/{kickoff_id}", headers=crews.headers).json()
        if body["status"] in words:
            return
        time.sleep(0.05)
    raise AssertionError(body)


def test_inputs(alone, crews: CrewServer):
    listed = alone("inputs", f"{crews.url}/greet")
    assert (listed.code, listed.out, listed.err) == (0, "Input\tNeeded\nwho\trequired\n", "")


def test_optional_inputs_are_listed_with_what_is_known_of_them(here):
    script = """
name: toned
inputs: [topic, {name: tone, required: false, description: How it sounds., default: dry}]
tasks: [{name: t, output: x}]
"""
    with CrewServer(script, token=TOKEN) as server:
        names = here("inputs", server.url).out
    assert names == "Input\tNeeded\ntopic\trequired\ntone\toptional\n"
    with CrewServer(script, token=TOKEN, dialect="live") as server:
        listed = here("inputs", server.url).out.splitlines()
    assert listed[0] == "Input\tNeeded\tDefault\tType\tDescription"
    assert listed[2] == "tone\toptional\tdry\tstring\tHow it sounds."


def test_inputs_as_json(here, crews: CrewServer):
    (only,) = here("inputs", f"{crews.url}/greet", "--json").json
    assert (only["name"], only["required"]) == ("who", True)


def test_a_block_needs_the_prefect_api_and_says_so(alone):
    done = alone("inputs", "travel")
    assert done.code == 30
    assert "prefect server start" in done.err


def test_status_of_a_run_from_start_to_result(alone, here, crews: CrewServer):
    kickoff_id = kicked_off(crews, "greet")
    until(crews, "greet", kickoff_id, "completed")
    told = alone("status", f"{crews.url}/greet", kickoff_id)
    assert told.code == 0
    assert f"Run {kickoff_id}: completed" in told.out
    assert "**Hello** Ada" in told.out
    assert here("status", f"{crews.url}/greet", kickoff_id, "--output").out == "**Hello** Ada\n"
    document = here("status", f"{crews.url}/greet", kickoff_id, "--json").json
    assert document["state"] == "completed"
    assert [task["name"] for task in document["tasks"]] == ["think", "speak"]
    assert "raw" not in document


def test_status_of_a_failed_run_is_no_error_of_the_command(here, crews: CrewServer):
    kickoff_id = kicked_off(crews, "broken")
    until(crews, "broken", kickoff_id, "error")
    told = here("status", f"{crews.url}/broken", kickoff_id)
    assert told.code == 0
    assert "Error: no idea who Ada is" in told.out
    assert here("status", f"{crews.url}/broken", kickoff_id, "--output").code == 27


@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_run_that_nobody_knows(here, crews: CrewServer, command: str):
    done = here(command, f"{crews.url}/greet", "no-such-run")
    assert done.code == 18
    assert "no-such-run" in done.err


def waiting(run: Callable[[], Finished], word: str) -> Finished:
    """Run a command again and again until it says the word."""
    for _ in range(100):
        done = run()
        if word in done.out:
            return done
        time.sleep(0.05)
    raise AssertionError(done)


def test_a_person_rejects_and_approves_without_any_prefect_server(alone, here, crews: CrewServer):
    kickoff_id, url = kicked_off(crews, "reviewed"), f"{crews.url}/reviewed"
    waiting(lambda: here("status", url, kickoff_id), "waits for a person")
    rejected = alone("resume", url, kickoff_id, "--reject", "--feedback", "shorter")
    assert (rejected.code, rejected.out.split(" (")[0]) == (0, f"Run {kickoff_id}: rejected")
    waiting(lambda: here("status", url, kickoff_id), "waits for a person")
    assert here("resume", url, kickoff_id, "--approve", "--json").json["status"] == "resumed"
    until(crews, "reviewed", kickoff_id, "completed")
    late = here("resume", url, kickoff_id, "--approve")
    assert late.code == 27
    assert "does not wait for a person: it is completed" in late.err


def test_stopping(alone, here, crews: CrewServer):
    kickoff_id, url = kicked_off(crews, "slow"), f"{crews.url}/slow"
    until(crews, "slow", kickoff_id, "running")
    stopped = alone("stop", url, kickoff_id)
    assert (stopped.code, stopped.out) == (0, f"Run {kickoff_id}: stopped.\n")
    again = here("stop", url, kickoff_id)
    assert again.code == 0
    assert "had ended before" in again.out


def test_stopping_where_there_is_no_stop(here):
    with CrewServer("echo", token="token-of-the-cli-tests", stop=False) as server:
        done = here("stop", server.url, "k1")
    assert done.code == 27
    assert "runs on" in done.err
