"""Servers inside this process: many runs, many event loops, many crews, and their ends."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import CrewInput, CrewStatus, TaskResult
from prefect_crew.devserver import CrewServer, InProcessCrewServer
from prefect_crew.devserver.runs import Outcome, Run
from prefect_crew.devserver.server import LocalServer
from prefect_crew.exceptions import AuthenticationError, CrewConnectionError
from prefect_crew.states import CrewState
from support.servers import ClientOf, Finished

KINDS = pytest.mark.parametrize("kind", [CrewServer, InProcessCrewServer], ids=["port", "in-process"])
SLEEPS = """
name: sleeps
inputs: [text]
tasks:
  - {name: a, seconds: 0.2, output: "{{ text }}"}
  - {name: b, seconds: 0.2, output: "{{ text }}!"}
"""


async def ended(client: CrewClient, kickoff_id: str) -> CrewStatus:
    deadline = time.monotonic() + 30
    while not (status := await client.status(kickoff_id)).state.ended:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    return status


@KINDS
async def test_a_hundred_runs_at_once(kind: type[LocalServer]) -> None:
    with kind(SLEEPS) as server:
        async with CrewClient(server.url, server.token) as client:
            gate = asyncio.Semaphore(8)

            async def one(number: int) -> CrewStatus:
                async with gate:
                    id_ = await client.kickoff({"text": f"run {number}"}, meta={"idempotency_key": f"k{number % 50}"})
                await asyncio.sleep(0.5)
                async with gate:
                    return await ended(client, id_)

            began = time.monotonic()
            statuses = await asyncio.gather(*(one(number) for number in range(100)))
            seconds = time.monotonic() - began
        assert [status.output for status in statuses] == [f"run {number}!" for number in range(100)]
        assert seconds < 15  # one after another they would take 40 s
        assert server.kickoffs == 100
        assert set(server.kickoffs_by_key.values()) == {2}


def test_an_answer_is_not_held_back_by_the_kernel(client_of: ClientOf) -> None:
    with CrewServer("echo") as server:
        client = client_of(server)
        began = time.monotonic()
        for _ in range(60):
            client.get("/inputs")
        assert time.monotonic() - began < 2  # with Nagle's algorithm and delayed acknowledgements 40 ms each, 2.4 s


def test_in_process_over_several_event_loops_and_threads() -> None:
    with InProcessCrewServer("echo") as server:

        async def start(text: str) -> str:
            async with CrewClient(server.url, server.token) as client:
                return await client.kickoff({"text": text})

        async def read(kickoff_id: str) -> str | None:
            async with CrewClient(server.url, server.token) as client:
                return (await ended(client, kickoff_id)).output

        ids = [asyncio.run(start(f"text {number}")) for number in range(5)]
        assert [asyncio.run(read(id_)) for id_ in ids] == [f"text {number}" for number in range(5)]

        outputs: dict[int, str | None] = {}
        threads = [
            threading.Thread(target=lambda n=number: outputs.update({n: asyncio.run(read(ids[n]))}))
            for number in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outputs == {number: f"text {number}" for number in range(5)}


def test_a_run_goes_on_when_its_client_is_gone() -> None:
    with InProcessCrewServer(SLEEPS, faults=["kickoff:latency=0.3"]) as server:

        async def hang_up() -> None:
            async with CrewClient(server.url, server.token) as client:
                kickoff = asyncio.create_task(client.kickoff({"text": "x"}))
                await asyncio.sleep(0.1)
                kickoff.cancel()
                await asyncio.gather(kickoff, return_exceptions=True)

        asyncio.run(hang_up())
        deadline = time.monotonic() + 10
        while not server.runs or server.runs[0].state is not CrewState.COMPLETED:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.kickoffs == 1


@KINDS
async def test_a_rotated_token(kind: type[LocalServer]) -> None:
    with kind("echo") as server:
        old = server.token
        server.token = "another"
        async with CrewClient(server.url, old) as client:
            with pytest.raises(AuthenticationError):
                await client.inputs()
        async with CrewClient(server.url, "another") as client:
            assert await client.inputs()
        server.restart()
        async with CrewClient(server.url, "another") as client:
            assert await client.inputs()
        assert server.counters.unauthorized == 1


@KINDS
async def test_several_crews_on_one_server(kind: type[LocalServer]) -> None:
    with kind({"a": "echo", "b": SLEEPS}) as server:
        async with CrewClient(f"{server.url}/a", server.token) as a, CrewClient(f"{server.url}/b", server.token) as b:
            id_ = await a.kickoff({"text": "only a knows"})
            assert (await ended(a, id_)).output == "only a knows"
            assert (await b.status(id_)).state is CrewState.UNKNOWN
            assert [item.name for item in await b.inputs()] == ["text"]
        assert len(server.runs) == 1


@KINDS
async def test_after_the_end_nobody_answers(kind: type[LocalServer]) -> None:
    server = kind(SLEEPS)
    with server:
        async with CrewClient(server.url, server.token) as client:
            await client.kickoff({"text": "x"})
            run = server.runs[0]
            server.stop()
            with pytest.raises(CrewConnectionError) as caught:
                await client.inputs()
            assert caught.value.sent is False
        server.stop()
    assert run.state is not CrewState.COMPLETED
    assert not [thread for thread in threading.enumerate() if thread.name == f"crew server {server.url}"]


def test_the_port_is_free_after_the_end() -> None:
    with CrewServer("echo") as server:
        port = server.port
        with pytest.raises(OSError, match="in use"):
            CrewServer("echo", port=port).start()
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"), CrewServer("echo", journal=tmp_path):
        pass


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text('{"event": "accepted", "id": "1", "crew": "echo"}\n')
    server = CrewServer("echo", journal=tmp_path / "journal")
    with pytest.raises(RuntimeError, match="does not start") as caught:
        server.start()
    assert caught.value.__cause__ is not None


def test_ids_of_any_kind(client_of: ClientOf, finished: Finished) -> None:
    ids = iter(["a/b c?d#e%2F", "ünï", "..", "status"])
    with CrewServer("echo", new_id=lambda: next(ids)) as server:
        for id_ in ["a/b c?d#e%2F", "ünï", "..", "status"]:

            async def use() -> str | None:
                async with CrewClient(server.url, server.token) as client:
                    return (await ended(client, await client.kickoff({"text": "x"}))).output

            assert asyncio.run(use()) == "x", id_


class Odd:
    """A program that does what the protocol does not forbid."""

    name = "odd"

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="what")]

    async def execute(self, run: Run) -> Outcome:
        what = run.inputs["what"]
        if what == "raise":
            raise KeyError("nobody expected this")
        if what == "cancel":
            raise asyncio.CancelledError
        if what == "exit":
            raise SystemExit("enough")
        if what == "own tasks":
            run.task_started("a")
            run.task_ended(TaskResult(name="a", output="told"))
            return Outcome(output="x", tasks=[TaskResult(name="b", output="known better")])
        if what == "stubborn":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                run.task_ended(TaskResult(name="late", output="too late"))
                return Outcome(output="done all the same")
        loop: dict[str, Any] = {}
        loop["loop"] = loop
        return Outcome(output="\ud800", data={"nan": float("nan"), ("a", 1): {1, 2}, "object": object, "loop": loop})


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("raise", "KeyError: 'nobody expected this'"),
        ("cancel", "the crew was cancelled from within"),
        ("exit", "SystemExit: enough"),
    ],
)
def test_whatever_a_program_raises_is_a_failed_run(
    client_of: ClientOf, finished: Finished, what: str, error: str
) -> None:
    with CrewServer(Odd()) as server:
        client = client_of(server)
        body = finished(client, client.post("/kickoff", json={"inputs": {"what": what}}).json()["kickoff_id"])
    assert (body["status"], body["error"]) == ("error", error)


def test_a_program_may_know_its_tasks_better(client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(Odd()) as server:
        client = client_of(server)
        body = finished(client, client.post("/kickoff", json={"inputs": {"what": "own tasks"}}).json()["kickoff_id"])
    assert [task["output"] for task in body["result"]["tasks"]] == ["known better"]


def test_a_stopped_run_stays_stopped(client_of: ClientOf) -> None:
    with CrewServer(Odd()) as server:
        client = client_of(server)
        id_ = client.post("/kickoff", json={"inputs": {"what": "stubborn"}}).json()["kickoff_id"]
        while server.run(id_).state is not CrewState.RUNNING:
            time.sleep(0.01)
        assert client.post(f"/stop/{id_}").status_code == 200
        time.sleep(0.1)
        assert client.get(f"/status/{id_}").json()["status"] == "stopped"
        assert server.run(id_).tasks == []


def test_results_that_json_cannot_hold(client_of: ClientOf, finished: Finished, tmp_path: Path) -> None:
    with CrewServer(Odd(), dialect="union", journal=tmp_path / "journal") as server:
        client = client_of(server)
        id_ = client.post("/kickoff", json={"inputs": {"what": "data"}}).json()["kickoff_id"]
        body = finished(client, id_)
        assert body["state"] == "SUCCESS"
        assert body["result_json"]["nan"] is None
        assert body["result_json"]["('a', 1)"] == [1, 2]
        server.restart()
        assert client_of(server).get(f"/status/{id_}").json()["result_json"]["nan"] is None


def test_inputs_of_any_kind_come_back(client_of: ClientOf, finished: Finished) -> None:
    with CrewServer("echo") as server:
        client = client_of(server)
        for text in ["\u202eright to left", "a" * 5_000_000, "\x00\x1f", "😀"]:
            id_ = client.post("/kickoff", json={"inputs": {"text": text}}).json()["kickoff_id"]
            assert finished(client, id_)["result"]["output"] == text
        answer = client.post("/kickoff", content=b'{"inputs": {"text": "half \\ud800 a pair"}}')
        assert "half" in finished(client, answer.json()["kickoff_id"])["result"]["output"]


async def test_without_a_port_an_app_that_breaks_is_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    with InProcessCrewServer("echo") as server:
        monkeypatch.setattr(type(server.runtime.dialect), "inputs", lambda *_: 1 / 0)
        async with httpx.AsyncClient(transport=server.transport, base_url=server.url, headers=server.headers) as client:
            assert (await client.get("/inputs")).status_code == 500
