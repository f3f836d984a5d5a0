"""A crew over a list of inputs, in plain Prefect."""

from __future__ import annotations

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


async def fan_out(*args: Any, **kwargs: Any) -> Any:
    return await load_flow("fan_out.py:fan_out")(*args, **kwargs, return_state=True)


async def test_outputs_come_in_the_order_of_the_rows(save_crew: SaveCrew):
    server = save_crew("fan-out-picky", PICKY)
    words = ["one", "two", "two", "three"]
    state = await fan_out("fan-out-picky", [{"text": word} for word in words])
    assert await state.aresult() == words
    assert server.kickoffs == len(words)


async def test_rows_that_fail_fail_the_flow_and_are_named_and_all_are_in_the_table(save_crew: SaveCrew, seen: Seen):
    server = save_crew("fan-out-table", PICKY)
    state = await fan_out("fan-out-table", [{"text": word} for word in ("one", "bad", "two")])
    assert state.is_failed()
    assert "1 of 3 rows failed: 2." in state.message
    assert "cannot stomach bad" in state.message
    assert server.kickoffs == 3
    table = next(one for one in seen.artifacts("fan-out") if one["description"] == "fan-out-table: 3 rows")
    lines = json.loads(table["data"])
    assert [line["state"] for line in lines] == ["completed", "CrewFailedError", "completed"]
    assert all(line["run"] for line in lines)
    assert "cannot stomach bad" in lines[1]["error"]


@pytest.mark.parametrize(("retries", "kickoffs"), [(0, 1), (1, 2)], ids=["not-asked", "asked"])
async def test_a_failed_row_is_started_again_only_when_asked(save_crew: SaveCrew, retries: int, kickoffs: int):
    server = save_crew("fan-out-picky", PICKY)
    flow = load_flow("fan_out.py:fan_out")
    names = flow.fn.__globals__
    names["run_row"] = names["run_row"].with_options(retry_delay_seconds=0)
    state = await flow("fan-out-picky", [{"text": "bad"}], retries=retries, return_state=True)
    assert state.is_failed()
    assert server.kickoffs == kickoffs


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
