"""A crew over a list of inputs, in plain Prefect, sync and async."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from support.deployed import load_flow
from support.held import Held
from support.seen import Seen

SaveCrew = Callable[..., CrewServer]

PICKY = """
name: picky
inputs: [text]
tasks:
  - {name: t, seconds: 0.3, output: "{{ text }}", fail: "{% if text == 'bad' %}cannot stomach {{ text }}{% endif %}"}
"""


@pytest.fixture(params=["fan_out", "fan_out_async"])
def fan_out(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run the flow of that name to its state, in whatever kind of test: both are called alike."""
    flow = load_flow(f"fan_out.py:{request.param}")

    async def run(*args: Any, **kwargs: Any) -> Any:
        state = flow(*args, **kwargs, return_state=True)
        return await state if inspect.isawaitable(state) else state

    return run


async def test_outputs_come_in_the_order_of_the_rows(save_crew: SaveCrew, fan_out: Callable[..., Any]):
    server = save_crew("fan-out-picky", PICKY)
    words = ["one", "two", "two", "three"]
    state = await fan_out("fan-out-picky", [{"text": word} for word in words])
    assert await state.aresult() == words
    assert server.kickoffs == len(words)


async def test_rows_that_fail_fail_the_flow_and_are_named_and_the_others_are_kept(
    save_crew: SaveCrew, fan_out: Callable[..., Any]
):
    server = save_crew("fan-out-picky", PICKY)
    state = await fan_out("fan-out-picky", [{"text": word} for word in ("one", "bad", "two")])
    assert state.is_failed()
    assert "1 of 3 rows failed: 2." in state.message
    assert "cannot stomach bad" in state.message
    assert server.kickoffs == 3


def test_the_table_has_a_line_for_each_row(save_crew: SaveCrew, seen: Seen):
    save_crew("fan-out-table", PICKY)
    load_flow("fan_out.py:fan_out")("fan-out-table", [{"text": "one"}, {"text": "bad"}], return_state=True)
    table = next(one for one in seen.artifacts("fan-out") if one["description"] == "fan-out-table: 2 rows")
    lines = json.loads(table["data"])
    assert [(line["row"], line["state"]) for line in lines] == [(1, "completed"), (2, "CrewFailedError")]
    assert lines[0]["run"]
    assert lines[1]["run"]
    assert "cannot stomach bad" in lines[1]["error"]


@pytest.mark.parametrize(("buy_again", "kickoffs"), [(0, 1), (1, 2)], ids=["not-asked", "asked"])
async def test_a_failed_row_is_bought_again_only_when_asked(save_crew: SaveCrew, buy_again: int, kickoffs: int):
    server = save_crew("fan-out-picky", PICKY)
    flow = load_flow("fan_out.py:fan_out_async")
    names = flow.fn.__globals__
    names["arun_row"] = names["arun_row"].with_options(retry_delay_seconds=0)
    state = await flow("fan-out-picky", [{"text": "bad"}], buy_again=buy_again, return_state=True)
    assert state.is_failed()
    assert server.kickoffs == kickoffs


async def test_no_more_are_in_flight_than_allowed(save_crew: SaveCrew):
    in_flight: list[int] = []

    def may_end(_: int) -> bool:
        """Let a run end once there were two, and time for a third to be kicked off."""
        in_flight.append(sum(not run.state.ended for run in server.runs))
        return len(server.runs) >= 2 and len(in_flight) > 20 * len(server.runs)

    server = save_crew("fan-out-held", Held(until=may_end))
    await load_flow("fan_out.py:fan_out_async")("fan-out-held", [{"text": str(n)} for n in range(6)], at_once=2)
    assert server.kickoffs == 6
    assert max(in_flight) == 2
