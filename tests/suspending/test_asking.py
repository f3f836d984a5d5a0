"""A person is asked in a form while the flow run is suspended and holds no process: answered there, or elsewhere."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from prefect_crew.server import CrewScript
from support.deployed import command, wait_until
from support.stage import Asked, Stage
from support.workers import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

ENDS = ("Completed", "Failed", "Crashed")


def asking(name: str, *, seconds: float = 0.5, after: float = 0.2) -> CrewScript:
    """A crew that asks about its draft, and prints it once it is approved."""
    draft = {"name": "draft", "seconds": seconds, "human": True, "output": "{{ topic }} {{ round }} {{ feedback }}"}
    printed = {"name": "print", "seconds": after, "output": "Printed: {{ tasks.draft.output }}"}
    return CrewScript.model_validate({"name": name, "inputs": ["topic"], "tasks": [draft, printed]})


def working(name: str, seconds: float) -> CrewScript:
    work = {"name": "t", "seconds": seconds, "output": "about {{ topic }}"}
    return CrewScript.model_validate({"name": name, "inputs": ["topic"], "tasks": [work]})


@pytest.fixture(scope="module")
def worker(stage: Stage) -> Worker:
    """A worker that this module may look at: it takes runs like the stage's own."""
    return stage.workers[0]


def gone(worker: Worker) -> None:
    """Wait until no flow run has a process."""
    wait_until(lambda: worker.process.family() == [worker.process.pid], seconds=60, what="a worker without children")


def completed(stage: Stage, run_id: str) -> Any:
    run = stage.wait_for(run_id, *ENDS, seconds=150)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert not stage.notes()
    assert stage.inputs(run_id) == []
    return stage.result_of(run_id)


def suspended(stage: Stage, run_id: str, *, not_key: str | None = None) -> Asked:
    form = stage.form(run_id, not_key=not_key)
    assert form.state == "Suspended"
    return form


def events_to_the_end(stage: Stage, kickoff_id: str) -> list[Any]:
    """Return all events about a run, once that of its end is there."""
    body = {"filter": {"resource": {"id": [f"prefect-crew.run.{kickoff_id}"]}, "order": "ASC"}, "limit": 50}

    def look() -> list[Any] | None:
        events = stage.call("POST", "/events/filter", body)["events"]
        return events if any(event["event"] == "crew.completed" for event in events) else None

    return wait_until(look, seconds=60, what="crew.completed")


def test_a_person_rejects_and_approves_while_no_process_waits(stage: Stage, worker: Worker):
    crew = stage.crew("asked", asking("asked"), dialect="union")
    run_id = stage.start("reviewed", {"crew": "asked", "topic": "tea"})
    first = suspended(stage, run_id)
    assert "tea 1" in first.text
    assert "round 1" in first.text
    gone(worker)
    assert "person" in stage.sweep(), "the sweep leaves a form that is up"
    assert suspended(stage, run_id) == first
    assert stage.resume(run_id)["status"] == "REJECT", "resumed by hand, without an answer"
    assert stage.fill_in(run_id, decision="reject", feedback="Warmer.", name="Grace") == "ACCEPT"
    second = suspended(stage, run_id, not_key=first.key)
    assert "tea 2 Warmer." in second.text
    gone(worker)
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]
    assert stage.fill_in(run_id, decision="approve", name="Ada") == "ACCEPT"
    assert completed(stage, run_id) == "Printed: tea 2 Warmer."
    assert [crew.requests["resume"], crew.kickoffs] == [2, 1]
    told = events_to_the_end(stage, crew.runs[0].id)
    rounds = [event["payload"]["round"] for event in told if event["event"] == "crew.waiting"]
    assert rounds == [1, 2], "each question is told of once"


@pytest.mark.sampled
def test_an_answer_from_elsewhere_brings_the_flow_run_back(stage: Stage, worker: Worker):
    crew = stage.crew("elsewhere", asking("elsewhere"))
    run_id = stage.start("reviewed", {"crew": "elsewhere", "topic": "tea", "run_key": "elsewhere"})
    first = suspended(stage, run_id)
    gone(worker)
    command("prefect-crew", "reviews", "reject", "elsewhere", "--feedback", "No.", env=stage.env)
    wait_until(lambda: [str(run.state) for run in crew.runs] == ["waiting"], seconds=60, what="the next question")
    # The documented status looks the same in the next round: the sweep tells it by the answers on record.
    assert "resumed" in stage.sweep()
    second = suspended(stage, run_id, not_key=first.key)
    assert "round 2" in second.text
    command("prefect-crew", "reviews", "approve", "elsewhere", env=stage.env)
    wait_until(lambda: crew.runs[0].state.ended, seconds=60, what="the crew's end")
    stage.sweep()
    assert completed(stage, run_id).startswith("Printed")
    assert [crew.requests["resume"], crew.kickoffs] == [2, 1]


@pytest.mark.sampled
def test_two_questions_and_a_crew_that_ends_meanwhile(stage: Stage, worker: Worker):
    crew = stage.crew("twice", asking("twice"), dialect="union")
    beside = stage.crew("beside", working("beside", 25))
    run_id = stage.start("several_reviewed", {"crew": "twice", "topics": ["tea", "coffee"], "beside": "beside"})
    first = suspended(stage, run_id)
    gone(worker)
    wait_until(lambda: beside.runs[0].state.ended, seconds=60, what="the end of the crew that asks nobody")
    assert "resumed" in stage.sweep()
    again = suspended(stage, run_id, not_key=first.key)
    assert again.text == first.text, "the form is put up again"
    gone(worker)
    stage.sweep()
    assert suspended(stage, run_id) == again, "neither the form nor the question in line brings it back"
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    second = suspended(stage, run_id, not_key=again.key)
    assert {"tea 1" in text for text in (first.text, second.text)} == {True, False}
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    outputs = completed(stage, run_id)
    assert [output.split(" ")[:2] for output in outputs] == [
        ["Printed:", "tea"],
        ["Printed:", "coffee"],
        ["about", "beside"],
    ]
    assert [crew.requests["resume"], crew.kickoffs, beside.kickoffs] == [2, 2, 1]


@pytest.mark.sampled
def test_a_form_is_held_while_something_else_works_and_suspended_after_that(stage: Stage, worker: Worker):
    crew = stage.crew("beside-work", asking("beside-work"), dialect="union")
    stage.crew("long-work", working("long-work", 30))
    run_id = stage.start("reviewed_beside_work", {"crew": "beside-work", "beside": "long-work"})
    held = stage.form(run_id)
    assert held.state == "Paused"
    later = stage.form(run_id, not_key=held.key)
    assert later == ("Suspended", later.key, held.text)
    gone(worker)
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    assert completed(stage, run_id)[0].startswith("Printed: tea 1")
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]


@pytest.mark.sampled
@pytest.mark.parametrize("late", ["leave", "reject"])
def test_nobody_answers_in_time(late: str, stage: Stage, worker: Worker):
    crew = stage.crew(f"late-{late}", asking(f"late-{late}"))
    wait = {"mode": "suspend", "initial": 0.3, "max_interval": 1, "human_timeout": 40, "on_human_timeout": late}
    run_id = stage.start("reviewed", {"crew": f"late-{late}", "topic": "tea", "wait": wait})
    first = suspended(stage, run_id)
    gone(worker)
    wait_until(lambda: "resumed" in stage.sweep(), seconds=90, what="the end of people's time")
    if late == "leave":
        run = stage.wait_for(run_id, *ENDS)
        assert run["state_name"] == "Failed"
        assert "human time of 40 s" in run["state"]["message"]
        assert crew.requests["resume"] == 0
        assert stage.inputs(run_id) == []
        return
    second = suspended(stage, run_id, not_key=first.key)
    assert "round 2" in second.text
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    assert completed(stage, run_id)
    assert [crew.requests["resume"], crew.kickoffs] == [2, 1]


@pytest.mark.sampled
def test_an_answer_in_time_counts_though_no_worker_was_there_to_take_it(stage: Stage, worker: Worker):
    crew = stage.crew("in-time", asking("in-time"))
    wait = {"mode": "suspend", "initial": 0.3, "max_interval": 1, "human_timeout": 40, "on_human_timeout": "reject"}
    run_id = stage.start("reviewed", {"crew": "in-time", "topic": "tea", "wait": wait})
    suspended(stage, run_id)
    gone(worker)
    with stage.without_work():
        assert stage.fill_in(run_id, decision="approve", name="Ada") == "ACCEPT"
        time.sleep(42)
    assert completed(stage, run_id).startswith("Printed")
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]


@pytest.mark.sampled
def test_a_form_whose_process_died_while_putting_it_up_is_put_up_by_the_sweep(stage: Stage, worker: Worker):
    crew = stage.crew("in-vain", asking("in-vain"))
    run_id = stage.start("reviewed", {"crew": "in-vain", "topic": "tea"})
    first = suspended(stage, run_id)
    gone(worker)
    for key in stage.inputs(run_id):  # what is stored after the state, and so may be missing
        stage.call("DELETE", f"/flow_runs/{run_id}/input/{key}")
    assert "resumed" in stage.sweep()
    suspended(stage, run_id, not_key=first.key)
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    assert completed(stage, run_id).startswith("Printed")
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]


def test_a_process_that_is_killed_with_a_held_form_asks_again_when_it_is_retried(stage: Stage, worker: Worker):
    crew = stage.crew("killed", asking("killed"), dialect="union")
    wait = {"initial": 0.3, "max_interval": 1}
    run_id = stage.start("reviewed", {"crew": "killed", "topic": "tea", "wait": wait})
    first = stage.form(run_id)
    assert first.state == "Paused"
    for pid in worker.process.family():
        if pid != worker.process.pid:
            os.kill(pid, signal.SIGKILL)
    stage.wait_for(run_id, "Crashed")
    # The worker says so twice, and a retry in between would be undone.
    last = "prefect.flow_runs.worker - Check whether"
    wait_until(
        lambda: last in worker.process.output.rpartition(f"'{run_id}' as crashed")[2],
        seconds=60,
        what="the worker's last word",
    )
    assert stage.fill_in(run_id, decision="approve") == "ABORT", "nothing takes an answer now"
    command("prefect", "flow-run", "retry", run_id, env=stage.env)
    again = stage.form(run_id, not_key=first.key)
    assert again == ("Paused", again.key, first.text)
    assert stage.fill_in(run_id, decision="approve") == "ACCEPT"
    assert completed(stage, run_id).startswith("Printed: tea 1")
    assert [crew.requests["resume"], crew.kickoffs] == [1, 1]
