"""The same for flows that Prefect runs in processes of their own: killed there, and retried as a person does it.

None of them names an idempotency key: it is what Prefect keeps of a flow run that makes a retry find its runs again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import URL_SETTING
from proof.kills import Kill, order
from proof.resolve import let_an_hour_pass, resolve
from proof.test_kill_matrix import CREW
from proof.ways import WAYS, Ways
from support.prefect_server import PrefectServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("prefect_api"),
]

KILLS = {
    "before its start is on record": Kill("begin", "after"),
    "between answer and record": Kill("kickoff", "after"),
    "after the record": Kill("started", "committed"),
    "while it waits": Kill("status", "after", 2),
    "before the end is on record": Kill("ended", "after"),
}


@pytest.fixture(scope="module")
def ways(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with Ways(prefect_server, tmp_path_factory.mktemp("ways")) as running:
        yield running


@pytest.mark.parametrize("point", KILLS)
@pytest.mark.parametrize("name", WAYS)
def test_a_flow_run_that_was_killed_is_retried(
    name: str, point: str, ways: Ways, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_SETTING, ways.crew_database)
    way = ways.way(name)
    starts = 2 if name == "subflow" else 1
    with CrewServer(CREW) as server:
        block = f"killable-{tmp_path.name}".replace("_", "-").lower()
        server.crew(request_timeout=5, wait={"initial": 0.2, "max_interval": 0.5, "timeout": 60}).save(
            block, overwrite=True
        )
        order(KILLS[point], tmp_path / "kill.json")
        run_id = ways.start(way, {"crew": block, "kill_file": str(tmp_path / "kill.json")})
        crashed = ways.crashed(way, run_id)
        assert crashed["state_type"] == "CRASHED", crashed["state"]
        assert not (tmp_path / "kill.json").exists()

        asyncio.run(let_an_hour_pass())
        ways.retry(run_id)
        ended = ways.ended(run_id, "COMPLETED", "FAILED")
        if point == "between answer and record":
            assert ended["state_type"] == "FAILED"
            assert "uncertain" in ended["state"]["message"]
            assert server.kickoffs == starts
            resolve(server, _uncertain_key(server))
            ways.retry(run_id)
            ended = ways.ended(run_id, "COMPLETED", "FAILED")
        assert ended["state_type"] == "COMPLETED", ended["state"]
        assert server.kickoffs == starts
        assert set(server.kickoffs_by_key.values()) == {1}


def _uncertain_key(server: CrewServer) -> str:
    return list(server.accepted.values())[-1]["idempotency_key"]
