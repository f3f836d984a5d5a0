"""What a server that died knows when it comes back."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer, InProcessCrewServer
from prefect_crew.devserver.runs import Journal
from prefect_crew.devserver.server import LocalServer
from support.servers import ClientOf, Finished

SCRIPT = """
name: journaled
inputs: [text, {name: seconds, required: false, default: 0}]
tasks:
  - {name: first, agent: A, seconds: "{{ seconds }}", output: "{{ text }}", fail: "{{ 'no' if text == 'bad' else '' }}"}
usage: {total_tokens: 3}
"""


def kickoff(client: httpx.Client, **inputs: Any) -> str:
    return client.post("/kickoff", json={"inputs": inputs, "meta": {"idempotency_key": "k"}}).json()["kickoff_id"]


def test_ids_and_ends_survive_a_restart(tmp_path: Path, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(SCRIPT, journal=tmp_path / "journal", dialect="union") as server:
        client = client_of(server)
        ids = {
            name: kickoff(client, text=name, seconds=seconds)
            for name, seconds in [("good", 0), ("bad", 0), ("stop", 60)]
        }
        client.post(f"/stop/{ids['stop']}")
        before = {name: finished(client, id_) for name, id_ in ids.items()}
        assert [before[name]["state"] for name in ids] == ["SUCCESS", "FAILED", "REVOKED"]
        server.restart()
        after = {name: client_of(server).get(f"/status/{id_}").json() for name, id_ in ids.items()}
        assert after == {name: {**body, "last_step": None} for name, body in before.items()}
        assert server.kickoffs == 3
        assert server.kickoffs_by_key == {"k": 3}


@pytest.mark.parametrize(("on_crash", "status"), [("rerun", 200), ("lose", 404)])
def test_runs_in_flight(tmp_path: Path, client_of: ClientOf, on_crash: str, status: int) -> None:
    with CrewServer(SCRIPT, journal=tmp_path / "journal", on_crash=on_crash) as server:
        kickoff_id = kickoff(client_of(server), text="x", seconds=60)
        server.restart()
        answer = client_of(server).get(f"/status/{kickoff_id}")
        assert answer.status_code == status
        assert server.kickoffs == 1
        if on_crash == "rerun":
            assert answer.json()["status"] == "running"
            assert server.run(kickoff_id).inputs == {"text": "x", "seconds": 60}


def test_without_a_journal_all_is_forgotten(client_of: ClientOf) -> None:
    with CrewServer(SCRIPT) as server:
        kickoff_id = kickoff(client_of(server), text="x")
        server.restart()
        assert client_of(server).get(f"/status/{kickoff_id}").status_code == 404
        assert server.kickoffs == 1


@pytest.mark.parametrize("kind", [CrewServer, InProcessCrewServer])
@pytest.mark.parametrize(("phase", "known"), [("before", 0), ("after", 1)])
async def test_crash_at_the_kickoff(tmp_path: Path, kind: type[LocalServer], phase: str, known: int) -> None:
    with kind(SCRIPT, journal=tmp_path / "journal", faults=[f"kickoff:crash-{phase}-accept@1"]) as server:
        transport = server.transport if isinstance(server, InProcessCrewServer) else None
        async with httpx.AsyncClient(
            base_url=server.url, headers=server.headers, transport=transport, trust_env=False, verify=False
        ) as client:
            with pytest.raises(httpx.ReadError):
                await client.post("/kickoff", json={"inputs": {"text": "x"}})
            assert server.crashed.wait(5)
            with pytest.raises(httpx.ConnectError):
                await client.get("/inputs")
            server.restart()
            assert not server.crashed.is_set()
            assert (await client.get("/inputs")).status_code == 200
        assert len(server.runs) == known == server.kickoffs


def test_crash_at_the_nth_status(tmp_path: Path, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(SCRIPT, journal=tmp_path / "journal", faults=["status:crash@2"]) as server:
        client = client_of(server)
        kickoff_id = kickoff(client, text="x", seconds=0.05)
        assert client.get(f"/status/{kickoff_id}").status_code == 200
        with pytest.raises(httpx.ReadError):
            client.get(f"/status/{kickoff_id}")
        server.restart()
        assert finished(client, kickoff_id)["result"]["output"] == "x"
        assert server.kickoffs == 1


def test_a_line_cut_off_by_the_crash(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path).append({"event": "accepted", "id": "1", "text": "naïve \ud800"})
    with path.open("ab") as file:
        file.write(b'{"event": "accepted", "id": "2", "inp')
    journal = Journal(path)
    journal.append({"event": "accepted", "id": "3"})
    journal.close()
    assert [entry["id"] for entry in journal.read()] == ["1", "3"]


def test_webhooks_are_kept_and_nobody_else_can_read_them(tmp_path: Path, client_of: ClientOf) -> None:
    path = tmp_path / "journal"
    human = {"url": "http://127.0.0.1:9/x", "authentication": {"strategy": "bearer", "token": "s3cret"}}
    with CrewServer(SCRIPT, journal=path) as server:
        body = {"inputs": {"text": "x", "seconds": 60}, "humanInputWebhook": human}
        client_of(server).post("/kickoff", json=body)
        server.restart()
        hooks = server.runs[0].hooks
    assert hooks.human is not None
    assert hooks.human.authentication is not None
    assert hooks.human.authentication.token is not None
    assert hooks.human.authentication.token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(hooks)
    assert "127.0.0.1" not in repr(hooks)
    assert server.token not in repr(server.runtime)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text().splitlines()[0])["hooks"] == {"humanInputWebhook": human}


def test_a_crew_finds_only_its_own_runs(tmp_path: Path, client_of: ClientOf) -> None:
    path = tmp_path / "journal"
    with CrewServer(SCRIPT, journal=path) as server:
        kickoff(client_of(server), text="x")
    with CrewServer("echo", journal=path) as other:
        assert other.runs == []


def test_a_mount_finds_only_its_own_runs(tmp_path: Path, client_of: ClientOf) -> None:
    """Also where two mounts serve the same script."""
    with CrewServer({"a": SCRIPT, "b": SCRIPT}, journal=tmp_path / "journal") as server:
        client = client_of(server)
        body = {"inputs": {"text": "x", "seconds": 60}}
        kickoff_id = client.post("/a/kickoff", json=body).json()["kickoff_id"]
        server.restart()
        found = [client.get(f"/{name}/status/{kickoff_id}").status_code for name in "ab"]
        assert (found, len(server.runs)) == ([200, 404], 1)
