"""Real crews and flows behind the server: how they are loaded, what they take, give, report, ask and fail with."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.client.models import TaskResult
from prefect_crew.devserver import CrewServer, ProgramError, ProgramNotFoundError, Run, load_program
from support.environment import isolated
from support.servers import Serve, finished, kickoff, until

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(name="crew")
def crew_fixture(serve: Serve) -> Serve:
    """Give a function that serves a factory of `real_crews.py`, or of a file of the examples."""

    def start(spec: str) -> tuple[CrewServer, httpx.Client]:
        return serve(str(EXAMPLES / spec) if ":" in spec else f"{CREWS}:{spec}", response_format="union")

    return start


def calls() -> Counter[str]:
    return sys.modules["real_crews"].CALLS


def thread_of(run_id: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"crew run {run_id}"]


def resume(client: httpx.Client, run_id: str, task: str, *, approve: bool, feedback: str) -> str:
    body = {"execution_id": run_id, "task_id": task, "is_approve": approve, "human_feedback": feedback}
    answer = client.post("/resume", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["status"]


def shown(server: CrewServer, run_id: str) -> str:
    """Return what the person is shown."""
    (question,) = server.run(run_id).questions.values()
    return question.output


# A crew


def test_a_crew_gives_its_text_tasks_agents_and_usage(crew: Serve) -> None:
    _, client = crew("travel_crew.py:build")
    body = finished(client, kickoff(client, {"topic": "Lisbon", "audience": "families"}))
    assert body["state"] == "SUCCESS"
    assert body["output"].startswith("## A day in Lisbon for families")
    assert [(task["name"], task["agent"]) for task in body["tasks"]] == [
        ("research", "Travel researcher"),
        ("write", "Guide writer"),
    ]
    assert all(task["execution_time"] > 0 for task in body["tasks"])
    assert body["tasks"][0]["description"].startswith("Find out what families should know about Lisbon")
    assert body["tasks"][0]["output"].splitlines()[2] in body["output"], "the second task saw the first one's notes"
    assert body["tasks"][1]["output"] == body["output"]
    usage = body["token_usage"]
    assert usage["successful_requests"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert body["progress"] == {"completed_tasks": 2, "total_tasks": 2}
    assert body["last_step"]["agent"] == "Guide writer"


@pytest.mark.parametrize(
    ("spec", "error", "names"),
    [
        pytest.param("Classic", None, ["write"], id="crew-base-class"),
        pytest.param("parallel", None, ["both", "left", "right"], id="tasks-at-once"),
        pytest.param("failing", "no luck", [], id="model-fails"),
        pytest.param("Failing", "the flow ran dry", ["begin"], id="flow-fails"),
        pytest.param("breaks_later", "the recipe is lost", [], id="factory-fails"),
        pytest.param("leaves", "SystemExit", [], id="exits"),
        pytest.param("Speechless", "KeyError", [], id="no-text"),
    ],
)
def test_other_crews_and_flows(crew: Serve, spec: str, error: str | None, names: list[str]) -> None:
    _, client = crew(spec)
    before = calls()["failing"]
    body = finished(client, kickoff(client, {"topic": "rent"}))
    assert (body["state"], body["error"]) == ("FAILED" if error else "SUCCESS", error)
    assert sorted(task["name"] for task in body["tasks"]) == names
    assert calls()["failing"] - before == (3 if spec == "failing" else 0), "CrewAI itself tries three times"


def test_a_structured_result_is_data(crew: Serve) -> None:
    server, client = crew("structured")
    run_id = kickoff(client)
    body = finished(client, run_id)
    assert (body["result_json"]["title"], len(body["result_json"]["stops"])) == ("A plan", 2)
    assert server.run(run_id).tasks[0].data == body["result_json"]


def test_ten_runs_at_once_keep_their_words_and_tokens_apart(crew: Serve) -> None:
    server, client = crew("travel_crew.py:build")
    # Every topic is longer by a word, and so is everything that quotes it.
    topics = [" ".join(["Far"] * n + [f"Town{n}"]) for n in range(10)]
    alone = [finished(client, kickoff(client, {"topic": topic, "audience": "all"}))["token_usage"] for topic in topics]
    run_ids = [kickoff(client, {"topic": topic, "audience": "all"}) for topic in topics]
    bodies = [finished(client, run_id) for run_id in run_ids]
    for topic, run_id, body in zip(topics, run_ids, bodies, strict=True):
        assert body["output"].startswith(f"## A day in {topic} for all\n")
        assert [task["name"] for task in body["tasks"]] == ["research", "write"]
        for said in (*(task["output"] for task in body["tasks"]), server.run(run_id).last_step.content):  # type: ignore[union-attr]
            assert f" {topic}" in said
    assert [body["token_usage"] for body in bodies] == alone
    assert len({usage["total_tokens"] for usage in alone}) > 5, "counts that differ, so that a mix would show"


@pytest.mark.parametrize(("spec", "calls_of"), [("slow", "slow"), ("Slow", "slow flow")], ids=["crew", "flow"])
def test_a_stopped_run_ends_at_its_next_step(crew: Serve, spec: str, calls_of: str) -> None:
    server, client = crew(spec)
    before = calls()[calls_of]
    run_id = kickoff(client)
    until(lambda: len(server.run(run_id).tasks) == 1)
    assert client.post(f"/stop/{run_id}").status_code == 200
    assert finished(client, run_id)["state"] == "REVOKED"
    until(lambda: not thread_of(run_id))
    assert calls()[calls_of] - before <= 2, "of six or three"
    assert client.get(f"/status/{run_id}").json()["state"] == "REVOKED"


# A flow


def test_a_flow_gives_its_result_and_its_methods_as_tasks(crew: Serve) -> None:
    _, client = crew("report_flow.py:ReportFlow")
    body = finished(client, kickoff(client, {"topic": "tea", "sections": "1"}))
    assert body["state"] == "SUCCESS"
    assert body["result_json"]["title"] == "Report on tea"
    assert len(body["result_json"]["sections"]) == 1, "text becomes what the state's field asks for"
    assert [task["name"] for task in body["tasks"]] == ["research", "report"]
    assert all(task["execution_time"] >= 0 for task in body["tasks"])
    assert body["token_usage"]["successful_requests"] == 1
    assert body["progress"] == {"completed_tasks": 2, "total_tasks": 2}


def test_a_flow_needs_what_its_state_marks_as_required(crew: Serve) -> None:
    _, client = crew("report_flow.py:ReportFlow")
    assert client.get("/inputs").json() == {"inputs": ["topic", "sections"], "required_inputs": ["topic"]}, (
        "of the state's fields those that are required or described"
    )
    answer = client.post("/kickoff", json={"inputs": {"sections": "1"}})
    assert (answer.status_code, answer.json()["details"]) == (422, {"missing_inputs": ["topic"]})
    answer = client.post("/kickoff", json={"inputs": {"topic": "rent", "id": "1"}})
    assert (answer.status_code, "details" in answer.json()) == (422, False)


def test_what_a_flow_says_of_its_inputs() -> None:
    topic, sections = load_program(str(EXAMPLES / "report_flow.py:ReportFlow")).inputs()
    assert (topic.type, topic.required, topic.default) == ("str", True, None)
    assert (sections.type, sections.required, sections.default) == ("int", False, 2)
    assert sections.description == "How many sections it has, at most three."


def test_a_flow_starts_from_the_state_to_restore(crew: Serve) -> None:
    _, client = crew("Counting")
    first = finished(client, kickoff(client))
    state = json.loads(first["result"])["id"]
    answer = client.post("/kickoff", json={"inputs": {}, "restoreFromStateId": state})
    assert json.loads(finished(client, answer.json()["kickoff_id"])["result"])["count"] == 2


def test_methods_at_the_same_time(crew: Serve) -> None:
    _, client = crew("Wide")
    assert client.get("/inputs").json() == {"inputs": [], "required_inputs": []}, (
        "a state that is a dictionary declares nothing"
    )
    body = finished(client, kickoff(client, {"topic": "rent"}))
    assert sorted(task["name"] for task in body["tasks"]) == ["last", "left", "right"]
    assert body["token_usage"]["successful_requests"] == 2
    assert sorted(body["result_json"]) == ["a", "b"]


# People


def test_a_rejected_task_is_done_again_until_it_is_approved(crew: Serve) -> None:
    server, client = crew("reviewed_crew.py:build")
    run_id = kickoff(client, {"topic": "a picnic"})
    for feedback in ("name the place", ""):
        body = finished(client, run_id)
        assert (body["state"], body["task_id"], body["current_task"]) == ("PENDING_HUMAN_INPUT", "draft", "draft")
        assert shown(server, run_id).startswith("## An announcement of a picnic")
        assert resume(client, run_id, "draft", approve=False, feedback=feedback) == "retrying"
    finished(client, run_id)
    last = shown(server, run_id)
    assert last.endswith("- name the place\n- This is not approved. Improve it.")
    assert resume(client, run_id, "draft", approve=True, feedback="never mind") == "resumed"
    body = finished(client, run_id)
    assert body["state"] == "SUCCESS"
    assert [(task["name"], task["agent"]) for task in body["tasks"]] == [("draft", "Writer"), ("polish", "Editor")]
    assert body["tasks"][0]["output"] == last, "what was approved is what goes on"
    assert "> - name the place" in body["output"]
    assert "never mind" not in body["output"]
    assert body["token_usage"]["successful_requests"] == 4


def test_a_task_without_a_name_is_called_by_its_description(crew: Serve) -> None:
    _, client = crew("nameless")
    run_id = kickoff(client, {"topic": "rent"})
    name = finished(client, run_id)["task_id"]
    assert name == "Write about rent in a way that nobody has written about it…"
    assert resume(client, run_id, name, approve=True, feedback="") == "completed"
    assert finished(client, run_id)["tasks"][0]["name"] == name


def test_feedback_decides_which_way_a_flow_goes(crew: Serve) -> None:
    server, client = crew("reviewed_flow.py:ReviewedFlow")
    run_id = kickoff(client, {"topic": "rent"})
    assert finished(client, run_id)["task_id"] == "write"
    resume(client, run_id, "write", approve=False, feedback="be kinder")
    finished(client, run_id)
    letter = shown(server, run_id)
    assert "be kinder" in letter
    resume(client, run_id, "write", approve=True, feedback="")
    body = finished(client, run_id)
    assert body["result_json"] == {"letter": letter, "status": "sent"}
    assert [task["name"] for task in body["tasks"]] == ["begin", "write", "revise", "write", "send"]
    assert body["tasks"][3]["output"] == letter


def test_a_flow_that_let_go_of_its_question_goes_on(crew: Serve) -> None:
    _, client = crew("Paused")
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


def test_a_flow_may_ask_a_person_for_anything(crew: Serve) -> None:
    server, client = crew("Asking")
    run_id = kickoff(client)
    assert finished(client, run_id)["task_id"] == "greet"
    assert shown(server, run_id) == "What is your name?"
    resume(client, run_id, "greet", approve=True, feedback="Ada")
    assert finished(client, run_id)["output"] == "Hello, Ada!"


@pytest.mark.parametrize("spec", ["nameless", "reviewed_flow.py:ReviewedFlow"], ids=["crew", "flow"])
@pytest.mark.parametrize("how", ["stop", "server-ends"])
def test_no_thread_waits_for_a_person_who_is_no_longer_asked(crew: Serve, spec: str, how: str) -> None:
    server, client = crew(spec)
    before = threading.active_count()
    run_id = kickoff(client, {"topic": "rent"})
    assert finished(client, run_id)["state"] == "PENDING_HUMAN_INPUT"
    assert threading.active_count() > before
    if how == "stop":
        assert client.post(f"/stop/{run_id}").status_code == 200
        assert finished(client, run_id)["state"] == "REVOKED"
    else:
        server.stop()
    until(lambda: not thread_of(run_id))


# What they report


def recorded(**inputs: Any) -> tuple[Run, list[Any]]:
    """Return a run, and the list of what is reported to it, in order."""
    reports: list[Any] = []

    def listener(run: Run, event: str, value: Any) -> None:
        asyncio.get_running_loop()  # raises where this is not called on the event loop
        if event == "step":
            reports.append((event, value.agent, value.kind, value.content, value.tool))
        elif isinstance(value, TaskResult):
            reports.append((event, value.name, value.agent))
        else:
            reports.append((event, value, run.current_agent))

    return Run(inputs, listener=listener), reports


async def test_a_tool_s_use_is_reported_in_order() -> None:
    run, reports = recorded()
    await load_program(f"{CREWS}:with_tool").execute(run)
    assert run.planned == ["look"]
    assert reports == [
        ("task_started", "look", "Scout"),
        ("step", "Scout", "tool", "21 degrees in Lisbon", "weather"),
        ("step", "Scout", "thought", "I should look.", None),
        ("step", "Scout", "final_answer", "It is 21 degrees.", None),
        ("task_ended", "look", "Scout"),
    ]


async def test_a_flow_whose_methods_may_be_left_out_has_no_plan() -> None:
    run, reports = recorded()
    with pytest.raises(ProgramError):
        await load_program(f"{CREWS}:Failing").execute(run)
    assert run.planned == ["begin", "go_on"]
    assert [report[:2] for report in reports] == [
        ("task_started", "begin"),
        ("task_ended", "begin"),
        ("task_started", "go_on"),
    ]
    run, reports = recorded()
    running = asyncio.create_task(load_program(f"{CREWS}:Paused").execute(run))
    while not run.questions:
        await asyncio.sleep(0.005)
    assert (run.planned, reports[0][:2]) == ([], ("task_started", "prepare"))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_event_loop_stays_free_and_a_cancelled_run_reports_nothing() -> None:
    run, reports = recorded()
    running = asyncio.create_task(load_program(f"{CREWS}:slow").execute(run))
    ticks = 0
    while not run.tasks:
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10, "the first task takes 0.3 s at the least"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [report[1] for report in reports if report[0] == "task_ended"] == ["part 0"]


def test_max_runs_holds_for_crews_too(serve: Serve) -> None:
    server, client = serve(f"{CREWS}:slow", max_runs=1)
    first, second = kickoff(client), kickoff(client)
    until(lambda: server.run(first).current_task)
    assert server.run(second).state == "pending"
    client.post(f"/stop/{first}")
    until(lambda: server.run(second).current_task)


# Loading


@pytest.mark.parametrize(
    ("spec", "name", "inputs"),
    [
        (f"{EXAMPLES}/travel_crew.py:build", "travel_crew", ["audience", "topic"]),
        (f"{EXAMPLES}/report_flow.py:ReportFlow", "ReportFlow", ["topic", "sections"]),
        (f"{CREWS}:Classic", "Classic", ["topic"]),
        (f"{CREWS}:with_json_in_prompt", "real_crews", ["topic"]),
        (f"{CREWS}:Wide", "Wide", []),
    ],
    ids=["crew", "flow", "crew-base-class", "braces-that-are-no-input", "state-is-a-dictionary"],
)
def test_a_program_knows_its_name_and_inputs(spec: str, name: str, inputs: list[str]) -> None:
    program = load_program(spec)
    assert program.name == name
    assert [item.name for item in program.inputs()] == inputs
    assert name in repr(program)


MINE = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import travel_crew
class Crews:
    class Travel:
        @staticmethod
        def build():
            return travel_crew.build()
"""


@pytest.mark.parametrize(
    ("file", "spec", "name"),
    [
        pytest.param("my_crews.py", "my_crews:Crews.Travel.build", "my_crews", id="module-in-the-current-directory"),
        pytest.param("crews_of_mine.py", "crews_of_mine.py:Crews.Travel.build", "crews_of_mine", id="file"),
        pytest.param("json.py", "json.py:Crews.Travel.build", "json", id="file-named-like-a-loaded-module"),
    ],
)
def test_where_a_factory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, spec: str, name: str
) -> None:
    (tmp_path / file).write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_program(f"./{spec}" if ".py" in spec else spec).name == name
    assert sys.modules["json"] is json


@pytest.mark.parametrize("spec", ["laid_out.crew:Crews.Travel.build", "src/laid_out/crew.py:Crews.Travel.build"])
def test_a_project_as_crewai_creates_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    package = tmp_path / "src" / "laid_out"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tool.py").write_text("NAME = 'tool'")
    (package / "crew.py").write_text(f"from laid_out.tool import NAME\n{MINE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_program(spec).name == "crew"
    for module in [name for name in sys.modules if name.partition(".")[0] == "laid_out"]:
        del sys.modules[module]


def test_another_package_of_the_same_name_is_not_served_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for project in ("one", "two"):
        package = tmp_path / project / "same_name"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "crew.py").write_text(MINE)
    assert load_program(str(tmp_path / "one" / "same_name" / "crew.py:Crews.Travel.build")).name == "crew"
    with pytest.raises(ProgramNotFoundError, match=r"has loaded same_name.crew from .*one"):
        load_program(str(tmp_path / "two" / "same_name" / "crew.py:Crews.Travel.build"))
    for module in [name for name in sys.modules if name.partition(".")[0] == "same_name"]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("no_such_module:build", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:build", "There is no file .*file.py"),
        (f"{CREWS}:no_such_function", "'no_such_function' of .* does not exist. Name a function without arguments"),
        (f"{CREWS}:CREWS_OF_NOBODY", "does not exist"),
        (f"{CREWS}:_SAME", "is not a function"),
        (f"{CREWS}:same", "returned the same object twice"),
        (f"{CREWS}:asynchronous", "is async"),
        (f"{CREWS}:nothing", "returned NoneType: return a crewai Crew or Flow"),
        (f"{CREWS}:broken", "failed to build its crew: RuntimeError: the recipe is lost"),
        (f"{CREWS}:job", "failed to build its crew: TypeError"),
        (f"{CREWS}:Classic.nowhere", "'Classic.nowhere' of .* does not exist"),
    ],
    ids=lambda value: value.rpartition(":")[2] if ":" in value else "",
)
def test_what_cannot_be_served_is_said(spec: str, text: str) -> None:
    with pytest.raises(ProgramNotFoundError, match=text):
        load_program(spec)


def test_a_module_that_does_not_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "typo.py").write_text("import crewai\ncrewai.Crw()\n")
    with pytest.raises(ProgramNotFoundError, match=r"typo.py cannot be imported: AttributeError: .*Crw"):
        load_program(f"{tmp_path}/typo.py:build")
    assert "typo" not in sys.modules


def test_without_crewai_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crewai", None)
    with pytest.raises(ProgramNotFoundError, match=r"pip install 'prefect-crew\[crewai\]', with Python below 3.14"):
        load_program(f"{EXAMPLES}/travel_crew.py:build")


def test_crewai_s_surroundings_are_set_unless_the_user_has(tmp_path: Path) -> None:
    code = """
        import os, sys
        import prefect_crew.devserver._crewai_loader as real
        assert "crewai" not in sys.modules, "imported before anyone asked for a crew"
        real.load_crewai(sys.argv[1])
        from crewai_core.paths import db_storage_path
        print(db_storage_path())
        print(os.environ["CREWAI_TRACING_ENABLED"], os.environ["CREWAI_DISABLE_TELEMETRY"])
    """
    environment = isolated(tmp_path, {"CREWAI_DISABLE_TELEMETRY": "yes, please"})
    del environment["CREWAI_TRACING_ENABLED"]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), f"{EXAMPLES}/travel_crew.py:build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    storage, said = ran.stdout.splitlines()
    assert said == "false yes, please"
    assert Path(storage).name.startswith("prefect-crew-")
    assert not Path(storage).exists(), "it goes with the process"


# Results
