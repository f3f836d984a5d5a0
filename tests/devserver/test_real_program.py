"""What a real crew tells the server while it runs, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.client.models import TaskResult
from prefect_crew.devserver.crewai_runner import load_real
from prefect_crew.devserver.runs import Answer, ProgramError

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))


class Recording:
    """A run that writes down what it is told, in order."""

    stop_requested = False
    restore_from = None

    def __init__(self, **inputs: Any) -> None:
        self.id = "recorded"
        self.inputs: Mapping[str, Any] = inputs
        self.told: list[tuple[Any, ...]] = []
        self.thread_names: set[str] = set()

    def plan(self, tasks: list[str]) -> None:
        self.told.append(("plan", *tasks))

    def task_started(self, name: str, *, agent: str | None = None, description: str | None = None) -> None:
        self.told.append(("started", name, agent))

    def task_ended(self, task: TaskResult) -> None:
        self.told.append(("ended", task.name, task.agent))

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        asyncio.get_running_loop()  # raises where this is not called on the event loop
        self.told.append(("step", agent, kind, content, tool))

    async def ask(self, *, task_id: str, output: str) -> Answer:
        raise NotImplementedError


async def test_a_tool_s_use_is_told_in_order() -> None:
    run = Recording()
    await load_real(f"{CREWS}:with_tool").execute(run)
    assert run.told == [
        ("plan", "look"),
        ("started", "look", "Scout"),
        ("step", "Scout", "tool", "21 degrees in Lisbon", "weather"),
        ("step", "Scout", "thought", "I should look.", None),
        ("step", "Scout", "final_answer", "It is 21 degrees.", None),
        ("ended", "look", "Scout"),
    ]


async def test_a_flow_whose_methods_may_be_left_out_has_no_plan() -> None:
    run = Recording()
    with pytest.raises(ProgramError):
        await load_real(f"{CREWS}:Failing").execute(run)
    assert run.told == [
        ("plan", "begin", "go_on"),
        ("started", "begin", None),
        ("ended", "begin", None),
        ("started", "go_on", None),
    ]
    run = Recording()
    with pytest.raises(ProgramError):
        await load_real(f"{CREWS}:Paused").execute(run)
    assert run.told[0] == ("started", "prepare", None)


async def test_the_event_loop_stays_free() -> None:
    running = asyncio.create_task(load_real(f"{CREWS}:slow").execute(Recording()))
    turns = 0
    while not running.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 50, "the crew takes 1.8 s at the least"


@pytest.mark.parametrize(("max_runs", "at_once"), [(1, 1), (4, 4)], ids=["one", "four"])
async def test_no_more_than_max_runs_work_at_once(max_runs: int, at_once: int) -> None:
    program = load_real(f"{CREWS}:slow", max_runs=max_runs)  # slow enough for all to be seen at work together
    runs = [Recording() for _ in range(max_runs + 1)]
    tasks = [asyncio.create_task(program.execute(run)) for run in runs]
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, sum(bool(run.told) and not task.done() for run, task in zip(runs, tasks, strict=True)))
        await asyncio.sleep(0.005)
    assert most == at_once


async def test_stopped_runs_give_their_places_back() -> None:
    program = load_real(f"{CREWS}:slow", max_runs=1)
    for _ in range(3):
        run = Recording()
        running = asyncio.create_task(program.execute(run))
        while not run.told:
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        told = list(run.told)
    run = Recording()
    await asyncio.wait_for(program.execute(run), 30)
    assert run.told[-1] == ("ended", "part 5", "Writer 5")
    assert told == [("plan", *(f"part {n}" for n in range(6))), ("started", "part 0", "Writer 0")], (
        "silent once stopped"
    )


async def test_a_run_that_is_stopped_before_its_turn_never_starts() -> None:
    program = load_real(f"{CREWS}:slow", max_runs=1)
    first = asyncio.create_task(program.execute(Recording()))
    await asyncio.sleep(0)
    run = Recording()
    second = asyncio.create_task(program.execute(run))
    await asyncio.sleep(0.05)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert run.told == []


@pytest.mark.parametrize(
    ("spec", "text"),
    [("breaks_later", "the recipe is lost"), ("leaves", "SystemExit"), ("Speechless", "KeyError")],
    ids=["factory", "exit", "no-text"],
)
async def test_whatever_ends_a_crew_is_a_failed_run(spec: str, text: str) -> None:
    program = load_real(f"{CREWS}:{spec}")
    with pytest.raises(ProgramError, match=text):
        await program.execute(Recording())
