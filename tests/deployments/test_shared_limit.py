"""A limit on a crew's runs in flight that all flows share: `prefect gcl create`, and its name on the block."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.deployed import command, load_flow
from support.prefect_server import PrefectServer

Span = tuple[datetime, datetime]


def most_at_once(server: CrewServer) -> int:
    spans = [(run.created_at, run.created_at + timedelta(seconds=run.execution_time)) for run in server.runs]
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


@pytest.mark.parametrize("limited", [False, True], ids=["without", "with"])
async def test_two_flows_share_it(
    prefect_api: PrefectServer, crew_server: CrewServerFactory, instant_polling: None, tmp_path: Path, limited: bool
):
    name = f"crew-shared-{limited}".lower()
    env = prefect_api.env(home=tmp_path)
    command("prefect", "gcl", "create", name, "--limit", "1", env=env)
    script = "name: shared\ninputs: [topic]\ntasks: [{name: t, seconds: 1.0, output: done}]\n"
    server = crew_server(script)
    crew = server.crew(concurrency_limit=name if limited else None)
    await crew.save("shared", overwrite=True)
    one_crew, fan_out = load_flow("one_crew.py:one_crew"), load_flow("fan_out.py:fan_out")
    await asyncio.gather(
        one_crew("shared", {"topic": "tea"}),
        fan_out("shared", [{"topic": "coffee"}, {"topic": "cocoa"}], max_in_flight=2),
    )
    assert server.kickoffs == 3
    assert (most_at_once(server) == 1) is limited
