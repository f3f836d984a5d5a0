"""A crew over what another one's run gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefect_crew import CrewError, arun_crew
from prefect_crew.devserver import CrewServer
from support.deployed import load_flow

SaveCrew = Callable[..., CrewServer]
AFTER = """
name: after
inputs: [draft, tone]
tasks: [{name: t, output: "{{ tone }}: {{ draft }}"}]
"""


async def test_the_other_crews_result_is_an_input_and_an_event_that_comes_twice_starts_one_run(save_crew: SaveCrew):
    save_crew("follow-up-first")
    second = save_crew("follow-up-second", AFTER)
    await arun_crew("follow-up-first", {"text": "found it"}, idempotency_key="follow-up-key")
    follow_up = load_flow("follow_up.py:follow_up")
    for _ in range(2):
        text = await follow_up("follow-up-key", "follow-up-first", "follow-up-second", inputs={"tone": "dry"})
        assert text == "dry: found it"
    assert second.kickoffs == 1


async def test_a_run_that_nobody_knows_starts_nothing(save_crew: SaveCrew):
    save_crew("follow-up-first")
    second = save_crew("follow-up-second", AFTER)
    with pytest.raises(CrewError, match="no-such-key"):
        await load_flow("follow_up.py:follow_up")("no-such-key", "follow-up-first", "follow-up-second")
    assert second.kickoffs == 0
