"""Servers in this process and as processes of their own: many runs, restarts, and their ends."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver import CrewServer, Outcome, Run, load_program
from prefect_crew.devserver._app import CRASH_EXIT_CODE
from prefect_crew.devserver._scripts import ScriptedProgram
from prefect_crew.states import CrewState
from support.servers import Serve, finished, kickoff, until

SLEEPS = """
name: sleeps
inputs: [text, {name: seconds, required: false, default: 0.2}]
tasks:
  - {name: a, seconds: "{{ seconds }}", output: "{{ text }}", fail: "{{ 'no' if text == 'bad' else '' }}"}
  - {name: b, seconds: "{{ seconds }}", output: "{{ text }}!"}
"""


def test_a_hundred_runs_at_once(serve: Serve) -> None:
    server, client = serve(SLEEPS)
    began = time.monotonic()
    ids = [kickoff(client, {"text": f"run {n}"}, meta={"idempotency_key": f"k{n % 50}"}) for n in range(100)]
    outputs = [finished(client, id_)["result"]["output"] for id_ in ids]
    assert time.monotonic() - began < 15  # one after another they would take 40 s
    assert outputs == [f"run {number}!" for number in range(100)]
    assert server.kickoffs == 100
    assert set(server.kickoffs_by_key.values()) == {2}


def test_an_answer_is_not_held_back_by_the_kernel(serve: Serve) -> None:
    _, client = serve("echo")
    began = time.monotonic()
    for _ in range(60):
        client.get("/inputs")
    assert time.monotonic() - began < 2  # with Nagle's algorithm and delayed acknowledgements 40 ms each, 2.4 s


def test_a_server_starts_and_stops_at_once() -> None:
    began = time.monotonic()
    for _ in range(10):
        with CrewServer("echo") as server, httpx.Client(base_url=server.url) as client:
            assert client.get("/").text == "Healthy"  # the connection is still open when the server ends
    assert time.monotonic() - began < 1.5  # uvicorn by itself takes 0.2 s for each end


def test_a_rotated_token(serve: Serve) -> None:
    server, client = serve("echo")
    server.token = "another"
    assert client.get("/inputs").status_code == 401
    assert httpx.get(f"{server.url}/inputs", headers=server.headers).status_code == 200
    server.restart()
    assert httpx.get(f"{server.url}/inputs", headers=server.headers).status_code == 200
    assert server.unauthorized == 1
    assert "another" not in repr(server)


def test_several_crews_on_one_server(serve: Serve) -> None:
    server, client = serve({"a": "echo", "b": SLEEPS})
    id_ = client.post("/a/kickoff", json={"inputs": {"text": "only a knows"}}).json()["kickoff_id"]
    assert [client.get(f"/{name}/status/{id_}").status_code for name in "ab"] == [200, 404]
    assert client.get("/b/inputs").json()["required_inputs"] == ["text"]
    assert len(server.runs) == 1


def test_a_restart_keeps_ended_runs_and_begins_others_again(serve: Serve) -> None:
    server, client = serve(SLEEPS, response_format="union")
    ids = {text: kickoff(client, {"text": text, "seconds": 0}) for text in ("good", "bad")}
    before = {text: finished(client, id_) for text, id_ in ids.items()}
    ids["stop"] = kickoff(client, {"text": "stop", "seconds": 60})
    client.post(f"/stop/{ids['stop']}")
    running = kickoff(client, {"text": "again"}, humanInputWebhook={"url": "http://127.0.0.1:9/x"})
    server.restart()
    assert {text: client.get(f"/status/{ids[text]}").json() for text in before} == before
    assert client.get(f"/status/{ids['stop']}").json()["state"] == "REVOKED"
    assert finished(client, running)["output"] == "again!"
    assert server.run(running).targets.human_input is not None
    assert server.kickoffs == 4


def test_after_the_end_nobody_answers_and_the_port_is_free(serve: Serve) -> None:
    server, client = serve(SLEEPS)
    run = server.run(kickoff(client, {"text": "x"}))
    with pytest.raises(OSError, match="in use"):
        CrewServer("echo", port=server.port).start()
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()
    server.stop()
    server.stop()
    with pytest.raises(httpx.ConnectError):
        client.get("/inputs")
    assert run.state is CrewState.RUNNING
    assert not [thread for thread in threading.enumerate() if thread.name == f"crew server {server.url}"]
    with CrewServer("echo", port=server.port):
        assert client.get("/").text == "Healthy"


def test_a_hanging_request_does_not_hold_up_the_end(serve: Serve) -> None:
    server, client = serve("echo", faults=["inputs:timeout"])
    failures: list[BaseException] = []

    def hang() -> None:
        try:
            client.get("/inputs", timeout=30)
        except httpx.RemoteProtocolError as error:
            failures.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    until(lambda: server.requests["inputs"])
    began = time.monotonic()
    server.stop()
    thread.join()
    assert len(failures) == 1
    assert time.monotonic() - began < 0.9  # requests that only take long are waited for 1 s


# Programs


class Odd:
    """A program that does what the protocol does not forbid."""

    name = "odd"

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="what")]

    async def execute(self, run: Run) -> Outcome:
        match run.inputs["what"]:
            case "raise":
                raise KeyError("nobody expected this")
            case "cancel":
                raise asyncio.CancelledError
            case "exit":
                raise SystemExit("enough")
            case _:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
                run.task_ended(TaskResult(name="late", output="too late"))
                return Outcome(output="done all the same", data={"object": object})


def test_whatever_a_program_raises_is_a_failed_run(serve: Serve) -> None:
    _, client = serve(Odd())
    for what, error in (
        ("raise", "KeyError: 'nobody expected this'"),
        ("cancel", "the crew was cancelled from within"),
        ("exit", "SystemExit: enough"),
    ):
        body = finished(client, kickoff(client, {"what": what}))
        assert (body["status"], body["error"]) == ("error", error)


def test_a_stopped_run_stays_stopped(serve: Serve) -> None:
    server, client = serve(Odd())
    run = server.run(kickoff(client, {"what": "ignore it"}))
    until(lambda: run.state is CrewState.RUNNING)
    assert client.post(f"/stop/{run.id}").status_code == 200
    time.sleep(0.1)
    assert client.get(f"/status/{run.id}").json()["status"] == "stopped"
    assert run.tasks == []


def test_programs_are_found_by_name_by_path_and_by_text(tmp_path: Path) -> None:
    text = "name: mine\ntasks: [{name: t}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    for spec in ("echo", str(tmp_path / "mine.yaml"), tmp_path / "mine.yaml", text):
        program = load_program(spec, speed=3)
        assert isinstance(program, ScriptedProgram)
        assert (program.speed, program.name) == (3, "echo" if spec == "echo" else "mine")
        assert load_program(program) is program


# A process


def test_a_process_that_crashes() -> None:
    code = "from prefect_crew.devserver import serve; serve('echo', port=0, faults=['kickoff:crash-after-accept@1'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(
            r"Serving the crew echo at (\S+)  Try: CREW_TOKEN=(\S+) prefect-crew run \1 -i text=…  Stop", line
        )
        assert found, line
        headers = {"Authorization": f"Bearer {found[2]}"}
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{found[1]}/kickoff", headers=headers, json={"inputs": {"text": "x"}})
        assert process.wait(10) == CRASH_EXIT_CODE
