"""Servers in this process and as processes of their own: restarts, and their ends."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver import Answer, CrewServer, Outcome, Run
from prefect_crew.devserver._server import CRASH_EXIT_CODE
from prefect_crew.states import CrewState
from support.servers import Serve, finished, kickoff
from support.waiting import wait_until

SLEEPS = """
name: sleeps
inputs: [text, {name: seconds, required: false, default: 0.2}]
tasks:
  - {name: a, seconds: "{{ seconds }}", output: "{{ text }}", fail: "{{ 'no' if text == 'bad' else '' }}"}
  - {name: b, seconds: "{{ seconds }}", output: "{{ text }}!"}
"""


def test_a_restart_repeats_runs_that_had_not_ended(serve: Serve) -> None:
    server, client = serve(SLEEPS, response_format="union")
    ids = {text: kickoff(client, {"text": text, "seconds": 0}) for text in ("good", "bad")}
    before = {text: finished(client, id_) for text, id_ in ids.items()}
    ids["stop"] = kickoff(client, {"text": "stop", "seconds": 60})
    client.post(f"/stop/{ids['stop']}")
    running = kickoff(client, {"text": "again"}, humanInputWebhook={"url": "http://127.0.0.1:9/x"})
    server.token = "another"
    server.restart()
    assert client.get("/inputs").status_code == 401
    assert (server.unauthorized, server.kickoffs) == (1, 4)
    assert "another" not in repr(server)
    client.headers.update(server.headers)
    assert {text: client.get(f"/status/{ids[text]}").json() for text in before} == before
    assert client.get(f"/status/{ids['stop']}").json()["state"] == "REVOKED"
    assert finished(client, running)["output"] == "again!"
    assert server.run(running).targets.human_input is not None


def test_a_restart_heals_no_stuck_run(serve: Serve) -> None:
    server, client = serve("echo", faults=["kickoff:stuck", "status:forgotten@2"])
    kickoff_id = kickoff(client, {"text": "x"})
    assert [client.get(f"/status/{kickoff_id}").status_code for _ in range(2)] == [200, 404]
    server.faults.clear()
    server.restart()
    assert client.get(f"/status/{kickoff_id}").status_code == 404
    wait_until(lambda: server.run(kickoff_id).state is not CrewState.PENDING)
    time.sleep(0.05)
    assert server.run(kickoff_id).state is CrewState.RUNNING


def test_a_stopped_server_frees_its_port(serve: Serve) -> None:
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


def test_a_hanging_request_does_not_hold_the_end(serve: Serve) -> None:
    server, client = serve("echo", faults=["inputs:timeout"])
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(client.get, "/inputs", timeout=30)
        wait_until(lambda: server.requests["inputs"])
        began = time.monotonic()
        server.stop()
        assert isinstance(hanging.exception(), httpx.RemoteProtocolError)
    assert time.monotonic() - began < 0.9  # requests that only take long are waited for 1 s


class Odd:
    """A program that does what the protocol does not forbid."""

    name = "odd"

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="what")]

    async def execute(self, run: Run) -> Outcome:
        if isinstance(what := run.inputs["what"], str) and what in RAISED:
            raise RAISED[what][0]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        run.task_ended(TaskResult(name="late", output="too late"))
        return Outcome(output="done all the same", data={"object": object})


RAISED: dict[str, tuple[BaseException, str]] = {
    "raise": (KeyError("nobody expected this"), "KeyError: 'nobody expected this'"),
    "cancel": (asyncio.CancelledError(), "the crew was cancelled from within"),
    "exit": (SystemExit("enough"), "SystemExit: enough"),
}


def test_whatever_a_program_raises_fails_its_run(serve: Serve) -> None:
    server, client = serve(Odd())
    for what, (_, error) in RAISED.items():
        body = finished(client, kickoff(client, {"what": what}))
        assert (body["status"], body["error"]) == ("error", error)
    run = server.run(kickoff(client, {"what": "ignore it"}))
    wait_until(lambda: run.state is CrewState.RUNNING)
    assert client.post(f"/stop/{run.id}").status_code == 200
    time.sleep(0.1)
    assert client.get(f"/status/{run.id}").json()["status"] == "stopped"
    assert run.tasks == []


def test_program_without_a_definition_is_not_inspected(serve: Serve) -> None:
    assert serve(Odd())[1].get("/inspect").status_code == 404


class Twice:
    """A program that asks two questions about one task at once."""

    name = "twice"

    def inputs(self) -> list[CrewInput]:
        return []

    async def execute(self, run: Run) -> Outcome:
        answers = await asyncio.gather(*(run.ask(task_id="review", output=text) for text in ("one", "two")))
        return Outcome(" ".join(answer.feedback for answer in answers))


def test_questions_of_a_task_are_asked_in_turn(serve: Serve) -> None:
    server, client = serve(Twice(), response_format="union")
    kickoff_id = kickoff(client)
    for output in ("one", "two"):
        wait_until(lambda output=output: [one.output for one in server.run(kickoff_id).questions.values()] == [output])
        answer = {"execution_id": kickoff_id, "task_id": "review", "human_feedback": f"a {output}", "is_approve": True}
        assert client.post("/resume", json=answer).status_code == 200
    assert finished(client, kickoff_id)["output"] == "a one a two"


async def test_the_end_of_a_run_ends_its_questions() -> None:
    run = Run({})
    run.begin()
    asking = [asyncio.create_task(run.ask(task_id="review", output="x")) for _ in range(2)]
    await asyncio.sleep(0)
    run.end(CrewState.STOPPED)
    assert run.answer("review", Answer(approve=True, feedback="")) is None
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(error) for error in ends] == [asyncio.CancelledError] * 2


def test_a_process_that_crashes() -> None:
    code = "from prefect_crew.devserver import serve; serve('echo', port=0, faults=['kickoff:crash-after-accept@1'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        said = r"Serving the crew echo at (\S+)  Try: CREW_TOKEN=(\S+) prefect-crew run \1 -i text=…  Stop"
        found = re.match(said, line)
        assert found, line
        headers = {"Authorization": f"Bearer {found[2]}"}
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{found[1]}/kickoff", headers=headers, json={"inputs": {"text": "x"}})
        assert process.wait(10) == CRASH_EXIT_CODE
