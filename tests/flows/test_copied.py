"""The flows of flows/, which users copy: one crew, a follow-up, a fan-out, the reports."""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable
from runpy import run_path
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from prefect_crew import CrewError, arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.reviews import form
from support.deployed import ROOT, load_flow
from support.held import FailsFirst, Held
from support.scripts import PICKY
from support.seen import Seen
from support.waiting import wait_until

SaveCrew = Callable[..., CrewServer]


async def test_one_crew_runs_a_block_once_a_key(save_crew: SaveCrew):
    server = save_crew("one-crew-echo")
    one_crew = load_flow("one_crew.py:one_crew")
    for _ in range(2):
        assert await one_crew("one-crew-echo", {"text": "ciao"}, idempotency_key="one-crew-once") == "ciao"
    assert server.kickoffs == 1


# A crew over what another one's run gave

AFTER = """
name: after
inputs: [draft, tone]
tasks: [{name: t, output: "{{ tone }}: {{ draft }}"}]
"""


async def test_an_event_that_comes_twice_starts_one_follow_up(save_crew: SaveCrew):
    save_crew("follow-up-first")
    second = save_crew("follow-up-second", AFTER)
    follow_up = load_flow("follow_up.py:follow_up")
    with pytest.raises(CrewError, match="no-such-key"):
        await follow_up("no-such-key", "follow-up-first", "follow-up-second")
    assert second.kickoffs == 0
    await arun_crew("follow-up-first", {"text": "found it"}, idempotency_key="follow-up-key")
    for _ in range(2):
        text = await follow_up("follow-up-key", "follow-up-first", "follow-up-second", inputs={"tone": "dry"})
        assert text == "dry: found it"
    assert second.kickoffs == 1


# A crew over a list of inputs, in plain Prefect


async def fan_out(*args: Any, **kwargs: Any) -> Any:
    return await load_flow("fan_out.py:fan_out")(*args, **kwargs, return_state=True)


async def test_outputs_come_in_the_order_of_the_rows(save_crew: SaveCrew):
    server = save_crew("fan-out-picky", PICKY)
    words = ["one", "two", "two", "three"]
    state = await fan_out("fan-out-picky", [{"topic": word} for word in words])
    assert await state.aresult() == [f"on {word}" for word in words]
    assert server.kickoffs == len(words)


async def test_failed_rows_fail_the_flow_and_all_are_in_a_table(save_crew: SaveCrew, seen: Seen):
    server = save_crew("fan-out-table", PICKY)
    state = await fan_out("fan-out-table", [{"topic": word} for word in ("one", "bad", "two")])
    assert state.is_failed()
    assert "1 of 3 rows failed: 2." in state.message
    assert "no bad" in state.message
    assert server.kickoffs == 3
    tables = seen.artifacts("fan-out")
    table = next(table for table in tables if table["description"] == "fan-out-table: 3 rows")
    lines = json.loads(table["data"])
    assert [line["state"] for line in lines] == ["completed", "CrewFailedError", "completed"]
    assert all(line["run"] for line in lines)
    assert "no bad" in lines[1]["error"]


async def test_a_failed_row_is_started_again_when_asked(save_crew: SaveCrew):
    server = save_crew("fan-out-picky", PICKY)
    flow = load_flow("fan_out.py:fan_out")
    names = flow.fn.__globals__
    names["run_row"] = names["run_row"].with_options(retry_delay_seconds=0)
    state = await flow("fan-out-picky", [{"topic": "bad"}], retries=1, return_state=True)
    assert state.is_failed()
    assert server.kickoffs == 2


async def test_no_more_are_in_flight_than_allowed(save_crew: SaveCrew):
    in_flight: list[int] = []

    def may_end(_: int) -> bool:
        """Let a run end once there were two, and time for a third to be kicked off."""
        in_flight.append(sum(not run.state.ended for run in server.runs))
        return len(server.runs) >= 2 and len(in_flight) > 20 * len(server.runs)

    server = save_crew("fan-out-held", Held(until=may_end))
    await fan_out("fan-out-held", [{"text": str(number)} for number in range(6)], max_in_flight=2)
    assert server.kickoffs == 6
    assert max(in_flight) == 2


# Research, write, review: as steps and by hand, and what a retry pays for

Crews = dict[str, CrewServer]


def kickoffs(crews: Crews) -> dict[str, int]:
    return {name: server.kickoffs for name, server in crews.items()}


@pytest.mark.parametrize("way", ["report_pipeline", "report_by_hand"])
async def test_each_crew_gets_what_the_one_before_it_gave(report_crews: Crews, way: str):
    text = await load_flow(f"report_pipeline.py:{way}")("tea", audience="beginners")
    for part in ("# tea", "For beginners", "The numbers on tea doubled", "Reviewed for beginners"):
        assert part in text
    assert kickoffs(report_crews) == {"research": 1, "write": 1, "review": 1}


async def test_a_retry_of_the_one_by_hand_starts_only_what_failed(report_crews: Crews, save_crew: SaveCrew):
    report_crews["review"] = save_crew("review", FailsFirst(str(ROOT / "flows" / "crews" / "review.yaml"), speed=10))
    flow = load_flow("report_pipeline.py:report_by_hand").with_options(retries=1, retry_delay_seconds=0)
    assert "Reviewed for everyone" in await flow("coffee")
    assert kickoffs(report_crews) == {"research": 1, "write": 1, "review": 2}


# The reviewed report: a person answers in the form of its flow run, as Prefect's page does


def test_the_draft_is_what_a_person_approved(save_crew: SaveCrew, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LOOK_EVERY", 0.2)
    crews = {name: save_crew(name, str(ROOT / "flows" / "crews" / f"{name}.yaml")) for name in ("research", "draft")}
    report, outcome = load_flow("reviewed_report.py:reviewed_report"), list[str]()

    def answer(before: str | None = None, **fields: Any) -> str | None:
        """Answer in the form that is up, and return its key; None while there is none but the one before."""
        runs = seen.post("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})
        run = next((run for run in runs if run["name"] == "reviewed report on oolong"), None)
        if run is None or run["state"]["state_details"]["pause_key"] == before:
            return None
        answered = seen.post(f"/flow_runs/{run['id']}/resume", {"run_input": fields})["status"]  # its fields may come
        return run["state"]["state_details"]["pause_key"] if answered == "ACCEPT" else None

    def run() -> None:
        outcome.append(asyncio.run(report("oolong", idempotency_key="oolong")))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    first = wait_until(lambda: answer(decision="reject", feedback="Shorter."), "the rejection")
    wait_until(lambda: answer(first, decision="approve", name="Ada"), "the approval")
    thread.join(60)
    assert "Changed after 1 reviews: Shorter." in outcome[0]
    assert crews["draft"].requests["resume"] == 2
    assert kickoffs(crews) == {"research": 1, "draft": 1}


# What Prefect's run form is made of: every parameter of every flow says what it is


PATHS = [*sorted((ROOT / "flows").glob("*.py")), ROOT / "prefect_crew" / "operations.py"]
FLOWS = [flow for path in PATHS for flow in run_path(str(path)).values() if isinstance(flow, Flow)]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_its_form_has_plain_values_that_are_described(flow: Flow[..., Any]):
    """A block as a parameter is stored with its secret starred out, and a class not at all."""
    schema = parameter_schema(flow).model_dump()
    assert schema["properties"]
    assert {name for name, field in schema["properties"].items() if not field.get("description")} == set()
    assert not schema.get("definitions"), "a parameter is an object of its own: give its parts, or a block's name"
    first = inspect.getdoc(flow.fn)
    assert first is not None
    assert first.split("\n\n")[0].endswith("."), "the description of the deployment is a sentence"
