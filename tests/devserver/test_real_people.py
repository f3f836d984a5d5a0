"""People in real crews and flows: what they see, and what becomes of what they say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver.runs import Program
from prefect_crew.devserver.server import CrewServer
from support.servers import ClientOf, Finished

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))
EXAMPLES = Path(__file__).parents[2] / "examples"
Serve = Callable[[str | Program], tuple[CrewServer, httpx.Client]]


@pytest.fixture
def serve(client_of: ClientOf) -> Iterator[Serve]:
    """Give a function that serves a factory of `real_crews.py`, or of a file of the examples."""
    servers: list[CrewServer] = []

    def start(spec: str | Program) -> tuple[CrewServer, httpx.Client]:
        servers.append(CrewServer(spec, dialect="union"))
        servers[-1].start()
        return servers[-1], client_of(servers[-1])

    yield start
    for server in servers:
        server.stop()


def kickoff(client: httpx.Client, **inputs: Any) -> str:
    return client.post("/kickoff", json={"inputs": inputs}).json()["kickoff_id"]


def resume(client: httpx.Client, run_id: str, task: str, *, approve: bool, feedback: str) -> str:
    body = {"execution_id": run_id, "task_id": task, "is_approve": approve, "human_feedback": feedback}
    answer = client.post("/resume", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["status"]


def seen(server: CrewServer, run_id: str) -> str:
    """Return what the person is shown."""
    (question,) = server.run(run_id).questions.values()
    return question.output


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.005)


def test_a_rejected_task_is_done_again_until_it_is_approved(serve: Serve, finished: Finished) -> None:
    server, client = serve(f"{EXAMPLES}/reviewed_crew.py:build")
    run_id = kickoff(client, topic="a picnic")
    for feedback in ("name the place", ""):
        body = finished(client, run_id)
        assert (body["state"], body["task_id"], body["current_task"]) == ("PENDING_HUMAN_INPUT", "draft", "draft")
        assert seen(server, run_id).startswith("## An announcement of a picnic")
        assert resume(client, run_id, "draft", approve=False, feedback=feedback) == "retrying"
    finished(client, run_id)
    last = seen(server, run_id)
    assert last.endswith("- name the place\n- This is not approved. Improve it.")
    assert resume(client, run_id, "draft", approve=True, feedback="never mind") == "resumed"
    body = finished(client, run_id)
    assert body["state"] == "SUCCESS"
    assert [(task["name"], task["agent"]) for task in body["tasks"]] == [("draft", "Writer"), ("polish", "Editor")]
    assert body["tasks"][0]["output"] == last, "what was approved is what goes on"
    assert "> - name the place" in body["output"]
    assert "never mind" not in body["output"]
    assert body["token_usage"]["successful_requests"] == 4


def test_a_task_without_a_name_is_called_by_its_description(serve: Serve, finished: Finished) -> None:
    _, client = serve(f"{CREWS}:nameless")
    run_id = kickoff(client, topic="rent")
    name = finished(client, run_id)["task_id"]
    assert name == "Write about rent in a way that nobody has written about it…"
    assert resume(client, run_id, name, approve=True, feedback="") == "completed"
    assert finished(client, run_id)["tasks"][0]["name"] == name


def test_feedback_decides_which_way_a_flow_goes(serve: Serve, finished: Finished) -> None:
    server, client = serve(f"{EXAMPLES}/reviewed_flow.py:ReviewedFlow")
    run_id = kickoff(client, topic="rent")
    assert finished(client, run_id)["task_id"] == "write"
    resume(client, run_id, "write", approve=False, feedback="be kinder")
    finished(client, run_id)
    letter = seen(server, run_id)
    assert "be kinder" in letter
    resume(client, run_id, "write", approve=True, feedback="")
    body = finished(client, run_id)
    assert body["result_json"] == {"letter": letter, "status": "sent"}
    assert [task["name"] for task in body["tasks"]] == ["begin", "write", "revise", "write", "send"]
    assert body["tasks"][3]["output"] == letter
    assert body["tasks"][3]["agent"] == "Letter writer"


def test_a_flow_that_let_go_of_its_question_goes_on(serve: Serve, finished: Finished) -> None:
    _, client = serve(f"{CREWS}:Paused")
    run_id = kickoff(client)
    assert finished(client, run_id)["task_id"] == "show"
    resume(client, run_id, "show", approve=True, feedback="fine")
    assert finished(client, run_id)["task_id"] == "show_again"
    resume(client, run_id, "show_again", approve=False, feedback="")
    body = finished(client, run_id)
    assert body["state"] == "SUCCESS", body["error"]
    assert body["output"].startswith("## A letter")
    assert body["output"].endswith(" / fine / Rejected")
    assert [task["name"] for task in body["tasks"]] == ["prepare", "show", "show_again", "finish"]
    assert body["token_usage"]["successful_requests"] == 1


def test_a_flow_may_ask_a_person_for_anything(serve: Serve, finished: Finished) -> None:
    server, client = serve(f"{CREWS}:Asking")
    run_id = kickoff(client)
    assert finished(client, run_id)["task_id"] == "greet"
    assert seen(server, run_id) == "What is your name?"
    resume(client, run_id, "greet", approve=True, feedback="Ada")
    assert finished(client, run_id)["output"] == "Hello, Ada!"


def test_those_who_wait_for_a_person_leave_the_place_to_others(serve: Serve, finished: Finished) -> None:
    from prefect_crew.devserver.crewai_runner import load_real

    _, client = serve(load_real(f"{CREWS}:nameless", max_runs=1))
    run_ids = [kickoff(client, topic=f"town {n}") for n in range(5)]
    bodies = [finished(client, run_id) for run_id in run_ids]
    assert [body["state"] for body in bodies] == ["PENDING_HUMAN_INPUT"] * 5
    for run_id, body in zip(run_ids, bodies, strict=True):
        resume(client, run_id, body["task_id"], approve=True, feedback="")
    for n, run_id in enumerate(run_ids):
        assert f"town {n}" in finished(client, run_id)["output"]


@pytest.mark.parametrize(
    "spec", [f"{CREWS}:nameless", f"{EXAMPLES}/reviewed_flow.py:ReviewedFlow"], ids=["crew", "flow"]
)
@pytest.mark.parametrize("how", ["stop", "server-ends"])
def test_no_thread_waits_for_a_person_who_is_no_longer_asked(
    serve: Serve, finished: Finished, spec: str, how: str
) -> None:
    server, client = serve(spec)
    before = threading.active_count()
    run_id = kickoff(client, topic="rent")
    assert finished(client, run_id)["state"] == "PENDING_HUMAN_INPUT"
    assert threading.active_count() > before
    if how == "stop":
        assert client.post(f"/stop/{run_id}").status_code == 200
        assert finished(client, run_id)["state"] == "REVOKED"
    else:
        server.stop()
    until(lambda: not any(thread.name == f"crew run {run_id}" for thread in threading.enumerate()))
