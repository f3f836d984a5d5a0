"""The fixtures for users' tests, used as a user would."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.crew import WaitPolicy
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.polling import Phases, Watcher, poll
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory

pytest_plugins = ["pytester"]

CREW = "name: mine\ninputs: [topic]\ntasks: [{name: t, output: 'about {{ topic }}'}]"


async def output(server: CrewServer, **inputs: str) -> str | None:
    async with CrewClient(server.url, server.token) as client:
        id_ = await client.kickoff(inputs)
        while not (status := await client.status(id_)).state.ended:
            await asyncio.sleep(0.01)
        return status.output


async def test_several_servers_in_one_test(
    crew_server: CrewServerFactory, scripted_crew: CrewServer, tmp_path: Path
) -> None:
    (tmp_path / "crew.yaml").write_text(CREW)
    first, second = crew_server(tmp_path / "crew.yaml"), scripted_crew
    block = first.crew(request_timeout=5)
    assert (block.url, block.token.get_secret_value(), block.request_timeout) == (first.url, first.token, 5)
    assert await output(first, topic="bees") == "about bees"
    assert await output(second, text="hi") == "hi"
    assert (first.kickoffs, second.kickoffs, second.runs[0].state) == (1, 1, CrewState.COMPLETED)


def test_options_and_ports(crew_server: CrewServerFactory) -> None:
    server = crew_server(CREW, faults=["inputs:503=2@1"], response_format="live", token="t")
    answers = [httpx.get(f"{server.url}/inputs", headers={"Authorization": "Bearer t"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 200]
    server.stop()
    assert crew_server("echo", port=server.port).port == server.port


def test_servers_end_with_their_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        servers = []

        def test_start(crew_server):
            servers.extend([crew_server("echo"), crew_server("echo")])
            assert all(server._thread.is_alive() for server in servers)

        def test_ended():
            assert [server._thread for server in servers] == [None, None]
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


async def test_instant_polling(crew_server: CrewServerFactory, instant_polling: None) -> None:
    server = crew_server("name: x\ntasks: [{name: t, seconds: 0.2, output: x}]")
    began = time.time()
    async with CrewClient(server.url, server.token) as client:
        id_ = await client.kickoff({})
        status = await poll(
            lambda: client.status(id_),
            kickoff_id=id_,
            policy=WaitPolicy(initial=10),
            phases=Phases(began),
            watcher=Watcher(),
        )
    assert status.state is CrewState.COMPLETED
    assert time.time() - began < 9
    assert server.requests["status"] > 2


def test_the_plugin_itself_is_light() -> None:
    """pytest loads it at every start: it must bring nothing along that its fixtures need only when used."""
    code = (
        "import sys, prefect_crew; before = set(sys.modules); import prefect_crew.testing; "
        "print(sorted(name for name in set(sys.modules) - before if name.startswith(('prefect', 'uvicorn'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['prefect_crew.testing']"
