"""One crew by its block's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefect_crew import CrewFailedError
from prefect_crew.devserver import CrewServer
from support.deployed import load_flow

SaveCrew = Callable[..., CrewServer]


async def test_gives_the_output_of_a_crew_that_only_its_block_names_once_a_key(save_crew: SaveCrew):
    server = save_crew("one-crew-echo")
    one_crew = load_flow("one_crew.py:one_crew")
    for _ in range(2):
        assert await one_crew("one-crew-echo", {"text": "ciao"}, idempotency_key="one-crew-once") == "ciao"
    assert server.kickoffs == 1


async def test_a_failed_crew_fails_the_flow_run_with_the_crews_own_error(save_crew: SaveCrew):
    save_crew("one-crew-broken", "name: broken\ntasks: [{name: t, fail: the well is dry}]\n")
    state = await load_flow("one_crew.py:one_crew")("one-crew-broken", {}, return_state=True)
    assert state.is_failed()
    assert "the well is dry" in state.message
    with pytest.raises(CrewFailedError):
        await state.aresult()
